"""Every route of the API."""

from __future__ import annotations

from typing import Any

from deployments.openai.admin import (
    AdminAnswer,
    DrainBody,
    ModelBody,
    ReplicaList,
    drain,
    list_replicas,
    load_model,
    unload_model,
)
from deployments.openai.chat.plan import create_chat_completion
from deployments.openai.chat.schema import ChatBody, ChatCompletion, ChatCompletionChunk
from deployments.openai.completions.answer import create_completion
from deployments.openai.completions.schema import CompletionBody, TextCompletion
from deployments.openai.embeddings import EmbeddingList, EmbeddingsBody, create_embeddings
from deployments.openai.http.route import Route
from deployments.openai.models import Health, ModelList, ModelObject, health, list_models, retrieve_model
from deployments.openai.responses.answer import create_response
from deployments.openai.responses.schema import ResponseObject, ResponsesBody
from deployments.openai.scores.decisions import create_decision
from deployments.openai.scores.schema import Decision, DecisionsBody
from deployments.openai.scores.score import ScoreBody, Scores, create_score
from deployments.openai.tokens import (
    DetokenizeBody,
    Detokenized,
    RenderedPrompt,
    RenderedPrompts,
    TokenizeBody,
    Tokenized,
    detokenize,
    render_chat,
    render_completion,
    tokenize,
    tokenizer_info,
)
from deployments.openai.transcriptions.answer import create_transcription, create_translation
from deployments.openai.transcriptions.schema import TranscriptEvent, Transcription, TranscriptionBody, TranslationBody
from deployments.openai.version import Version, show_version

_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 27 + 15?"}], "temperature": 0}
_TEXT: dict[str, Any] = {"prompt": "What is 27 + 15?", "max_tokens": 16, "temperature": 0}

ROUTES = (
    Route(
        method="POST",
        path="/chat/completions",
        handler=create_chat_completion,
        tag="chat",
        body=ChatBody,
        answer=ChatCompletion,
        event=ChatCompletionChunk,
        example=_CHAT,
    ),
    Route(
        method="POST",
        path="/completions",
        handler=create_completion,
        tag="completions",
        body=CompletionBody,
        answer=TextCompletion,
        event=TextCompletion,
        example=_TEXT,
    ),
    Route(
        method="POST",
        path="/responses",
        handler=create_response,
        tag="responses",
        body=ResponsesBody,
        answer=ResponseObject,
        event=dict[str, Any],
        example={"input": "What is 27 + 15?", "temperature": 0},
    ),
    Route(
        method="POST",
        path="/audio/transcriptions",
        handler=create_transcription,
        tag="audio",
        body=TranscriptionBody,
        answer=Transcription,
        event=TranscriptEvent,
        form=True,
    ),
    Route(
        method="POST",
        path="/audio/translations",
        handler=create_translation,
        tag="audio",
        body=TranslationBody,
        answer=Transcription,
        event=TranscriptEvent,
        form=True,
    ),
    Route(
        method="POST",
        path="/embeddings",
        handler=create_embeddings,
        tag="embeddings",
        body=EmbeddingsBody,
        answer=EmbeddingList,
        example={"input": "What is 27 + 15?"},
    ),
    Route(
        method="POST",
        path="/score",
        handler=create_score,
        tag="scores",
        body=ScoreBody,
        answer=Scores,
        example={"prompt": "27 + 15 = ", "choices": ["42", "43"]},
    ),
    Route(
        method="POST",
        path="/decisions",
        handler=create_decision,
        tag="scores",
        body=DecisionsBody,
        answer=Decision,
        example={
            "input": "27 + 15 = 42",
            "questions": [{"type": "predicate", "instructions": "The sum is right."}],
        },
    ),
    Route(
        method="POST",
        path="/chat/completions/render",
        handler=render_chat,
        tag="tokens",
        body=ChatBody,
        answer=RenderedPrompt,
        example=_CHAT,
    ),
    Route(
        method="POST",
        path="/completions/render",
        handler=render_completion,
        tag="tokens",
        body=CompletionBody,
        answer=RenderedPrompts,
        example=_TEXT,
    ),
    Route(
        method="POST",
        path="/tokenize",
        handler=tokenize,
        tag="tokens",
        body=TokenizeBody,
        answer=Tokenized,
        example={"prompt": "What is 27 + 15?"},
    ),
    Route(
        method="POST",
        path="/detokenize",
        handler=detokenize,
        tag="tokens",
        body=DetokenizeBody,
        answer=Detokenized,
        example={"tokens": [1, 2, 3]},
    ),
    Route(
        method="GET",
        path="/tokenizer_info",
        handler=tokenizer_info,
        tag="tokens",
        answer=dict[str, Any],
        query=("model",),
    ),
    Route(method="GET", path="/health", handler=health, tag="models", answer=Health, query=("verbose",), scoped=False),
    Route(method="GET", path="/version", handler=show_version, tag="models", answer=Version, scoped=False),
    Route(method="GET", path="/admin/replicas", handler=list_replicas, tag="admin", answer=ReplicaList, scoped=False),
    Route(
        method="POST",
        path="/admin/load",
        handler=load_model,
        tag="admin",
        body=ModelBody,
        answer=AdminAnswer,
        scoped=False,
    ),
    Route(
        method="POST",
        path="/admin/unload",
        handler=unload_model,
        tag="admin",
        body=ModelBody,
        answer=AdminAnswer,
        scoped=False,
    ),
    Route(
        method="POST", path="/admin/drain", handler=drain, tag="admin", body=DrainBody, answer=AdminAnswer, scoped=False
    ),
    Route(method="GET", path="/models", handler=list_models, tag="models", answer=ModelList),
    # Last: its path takes everything below /models.
    Route(
        method="GET",
        path="/models/{name:path}",
        handler=retrieve_model,
        tag="models",
        answer=ModelObject,
        scoped=False,
    ),
)
