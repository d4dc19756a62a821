"""Every route of the API, a line each: method, path, who answers, request, answer, and the events of its stream."""

from __future__ import annotations

from typing import Any

from deployments.openai import admin, models, tokens
from deployments.openai.batches import batches, files
from deployments.openai.batches import schema as batch_schema
from deployments.openai.chat.answer import create_chat_completion
from deployments.openai.chat.schema import ChatBody, ChatCompletion, ChatCompletionChunk
from deployments.openai.completions.answer import create_completion
from deployments.openai.completions.schema import CompletionBody, TextCompletion
from deployments.openai.embeddings import EmbeddingList, EmbeddingsBody, create_embeddings
from deployments.openai.http.route import Route
from deployments.openai.inside.captures import CaptureList, delete_capture, list_captures, retrieve_capture
from deployments.openai.inside.modules import ModuleList, UploadedVector, create_vector, list_modules
from deployments.openai.messages.answer import count_message_tokens, create_message
from deployments.openai.messages.schema import CountTokensBody, Message, MessagesBody, TokenCount
from deployments.openai.page.records import RecordList, list_records, retrieve_record
from deployments.openai.responses.answer import create_response
from deployments.openai.responses.schema import ResponseObject, ResponsesBody
from deployments.openai.scores.answer import create_decision, create_score
from deployments.openai.scores.schema import Decision, DecisionsBody, ScoreBody, Scores
from deployments.openai.transcriptions.answer import create_transcription, create_translation
from deployments.openai.transcriptions.schema import TranscriptEvent as Event
from deployments.openai.transcriptions.schema import Transcription, TranscriptionBody, TranslationBody

Json = dict[str, Any]

_RECORDS = ("model", "q", "limit", "after")
_FILES = ("purpose", "limit", "after", "order")
_BATCHES = ("limit", "after")
_Upload, _File, _Batch = batch_schema.UploadBody, batch_schema.FileObject, batch_schema.BatchObject
_Files, _Deleted, _Batches = batch_schema.FileList, batch_schema.DeletedFile, batch_schema.BatchList

ROUTES = (
    Route("POST", "/chat/completions", "chat", create_chat_completion, ChatBody, ChatCompletion, ChatCompletionChunk),
    Route("POST", "/completions", "completions", create_completion, CompletionBody, TextCompletion, TextCompletion),
    Route("POST", "/responses", "responses", create_response, ResponsesBody, ResponseObject, Json),
    Route("POST", "/messages", "messages", create_message, MessagesBody, Message, Json),
    Route("POST", "/messages/count_tokens", "messages", count_message_tokens, CountTokensBody, TokenCount),
    Route("FORM", "/audio/transcriptions", "audio", create_transcription, TranscriptionBody, Transcription, Event),
    Route("FORM", "/audio/translations", "audio", create_translation, TranslationBody, Transcription, Event),
    Route("POST", "/embeddings", "embeddings", create_embeddings, EmbeddingsBody, EmbeddingList),
    Route("POST", "/score", "scores", create_score, ScoreBody, Scores),
    Route("POST", "/decisions", "scores", create_decision, DecisionsBody, Decision),
    Route("POST", "/chat/completions/render", "tokens", tokens.render_chat, ChatBody, tokens.RenderedPrompt),
    Route("POST", "/completions/render", "tokens", tokens.render_completion, CompletionBody, tokens.RenderedPrompts),
    Route("POST", "/tokenize", "tokens", tokens.tokenize, tokens.TokenizeBody, tokens.Tokenized),
    Route("POST", "/detokenize", "tokens", tokens.detokenize, tokens.DetokenizeBody, tokens.Detokenized),
    Route("GET", "/tokenizer_info", "tokens", tokens.tokenizer_info, None, Json, query=("model",)),
    Route("GET", "/fingerprint", "models", models.show_fingerprint, None, models.Fingerprint, query=("model",)),
    Route("GET", "/modules", "inside", list_modules, None, ModuleList, query=("model", "match")),
    Route("POST", "/vectors", "inside", create_vector, None, UploadedVector, scoped=False),
    Route("GET", "/captures", "inside", list_captures, None, CaptureList, scoped=False),
    Route("GET", "/captures/{capture}", "inside", retrieve_capture, None, Json, scoped=False),
    Route("DELETE", "/captures/{capture}", "inside", delete_capture, None, Json, scoped=False),
    Route("FORM", "/files", "batches", files.upload_file, _Upload, _File, scoped=False),
    Route("GET", "/files", "batches", files.list_files, None, _Files, query=_FILES, scoped=False),
    Route("GET", "/files/{file_id}", "batches", files.retrieve_file, None, _File, scoped=False),
    Route("GET", "/files/{file_id}/content", "batches", files.file_content, None, bytes, scoped=False),
    Route("DELETE", "/files/{file_id}", "batches", files.delete_file, None, _Deleted, scoped=False),
    Route("POST", "/batches", "batches", batches.create_batch, batch_schema.BatchBody, _Batch, scoped=False),
    Route("GET", "/batches", "batches", batches.list_batches, None, _Batches, query=_BATCHES, scoped=False),
    Route("GET", "/batches/{batch_id}", "batches", batches.retrieve_batch, None, _Batch, scoped=False),
    Route("POST", "/batches/{batch_id}/cancel", "batches", batches.cancel_batch, None, _Batch, scoped=False),
    Route("GET", "/health", "models", models.health, None, models.Health, query=("verbose",), scoped=False),
    Route("GET", "/metrics", "models", models.show_metrics, None, str, scoped=False),
    Route("GET", "/version", "models", models.show_version, None, models.Version, scoped=False),
    Route("GET", "/admin/replicas", "admin", admin.list_replicas, None, admin.ReplicaList, scoped=False),
    Route("GET", "/admin/models", "admin", admin.list_added, None, admin.ModelStates, query=("refresh",), scoped=False),
    Route("POST", "/admin/models", "admin", admin.add_model, admin.AddedModel, admin.ModelState, scoped=False),
    Route("DELETE", "/admin/models/{name:path}", "admin", admin.remove_model, None, admin.RemovedModel, scoped=False),
    Route("POST", "/admin/load", "admin", admin.load_model, admin.ModelBody, admin.AdminAnswer, scoped=False),
    Route("POST", "/admin/unload", "admin", admin.unload_model, admin.ModelBody, admin.AdminAnswer, scoped=False),
    Route("POST", "/admin/drain", "admin", admin.drain, admin.DrainBody, admin.AdminAnswer, scoped=False),
    Route("GET", "/records", "admin", list_records, None, RecordList, query=_RECORDS, scoped=False),
    Route("GET", "/records/{record}", "admin", retrieve_record, None, Json, scoped=False),
    Route("GET", "/models", "models", models.list_models, None, models.ModelList),
    # Last: its path takes everything below /models.
    Route("GET", "/models/{name:path}", "models", models.retrieve_model, None, models.ModelObject, scoped=False),
)
