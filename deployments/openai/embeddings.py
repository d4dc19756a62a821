"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Response
from pydantic import BeforeValidator, Field, SkipValidation
from typing_extensions import TypedDict

from deployments.core.calls import Prompt, TextPrompt, TokensPrompt
from deployments.core.client import Embeddings, EmbedOptions
from deployments.core.errors import BadRequest
from deployments.core.model_card import ModelCard
from deployments.core.token_ids import TokenIds
from deployments.openai.chat.prompt import ChatInput, check_objects, check_special_tokens, inlined_prompt
from deployments.openai.completions.schema import PromptInput, prompt_inputs
from deployments.openai.fields.fields import MAX_WHOLE, TokenId, TurnFields, Whole
from deployments.openai.fields.other_servers import Rows
from deployments.openai.fields.other_servers_table import EMBEDDINGS
from deployments.openai.http.body import LARGE_BYTES
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import build, json_answer, to_json

_MAX_INPUTS = 2048
_OF_MESSAGES = frozenset({"add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"})


class EmbeddingsBody(TurnFields):
    """Texts, or one conversation, to be turned into vectors."""

    foreign: ClassVar[Rows] = EMBEDDINGS

    input: (
        Annotated[
            list[PromptInput],
            SkipValidation,
            BeforeValidator(
                prompt_inputs, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]]
            ),
            Field(max_length=_MAX_INPUTS),
        ]
        | None
    ) = Field(default=None, description="One or several texts, or lists of token ids.", examples=["a text"])
    messages: list[Any] | None = Field(default=None, description="A conversation in place of input.")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="Numbers, or the bytes of little-endian float32 as base64."
    )
    dimensions: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Number of dimensions to keep; the vector is scaled to length 1 again."
    )
    normalize: bool | None = Field(
        default=None, description="Scale vectors to length 1; the default depends on the model."
    )
    use_activation: bool | None = Field(default=None, description="The same as normalize.")
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1, le=MAX_WHOLE)] | None = Field(
        default=None, description="Tokens to keep of a longer text; -1 keeps as many as the model accepts."
    )
    truncation_side: Literal["left", "right"] | None = Field(
        default=None, description="Where tokens are left out; the tokenizer's own side by default."
    )
    prompt_name: str | None = Field(
        default=None, max_length=256, description="Prompt of a sentence-transformers model to add before a text."
    )
    add_special_tokens: bool | None = Field(default=None, description="True by default; false for messages.")
    add_generation_prompt: bool = Field(default=False, description="Open the assistant's turn after the messages.")
    continue_final_message: bool = Field(default=False, description="Leave the last message open.")
    chat_template: str | None = Field(
        default=None, max_length=65536, description="Template in place of the model's; only if the server allows it."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, such as enable_thinking."
    )


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingsUsage


async def create_embeddings(exchange: Exchange) -> Response:
    """The vectors of texts, or of a conversation."""
    body, card = await exchange.read(EmbeddingsBody)
    prompts = await _prompts(exchange, body, card)
    options = replace(_options(body), turn=exchange.turn)

    async def answer() -> bytes:
        found = await exchange.client.embed(card.id, prompts, options)
        large = sum(map(len, found.vectors)) > LARGE_BYTES
        return await build(lambda: to_json(_list(found, body.model, body.encoding_format)), large=large)

    return await json_answer(exchange, answer())


def _list(found: Embeddings, model: str, encoding: str) -> EmbeddingList:
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(vector, encoding)}
            for index, vector in enumerate(found.vectors)
        ],
        "usage": {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens},
    }


def _options(body: EmbeddingsBody) -> EmbedOptions:
    normalize = body.use_activation if body.normalize is None else body.normalize
    if body.use_activation is not None and body.use_activation != normalize:
        raise BadRequest(
            "Invalid 'use_activation': it is the same as 'normalize', which says otherwise; send one of them.",
            param="use_activation",
        )
    return EmbedOptions(
        normalize=normalize,
        dimensions=body.dimensions,
        truncate=body.truncate_prompt_tokens,
        truncation_side=body.truncation_side,
        prompt_name=body.prompt_name,
        param="input" if body.messages is None else "messages",
    )


async def _prompts(exchange: Exchange, body: EmbeddingsBody, card: ModelCard) -> list[Prompt]:
    if body.input is not None and body.messages is not None:
        raise BadRequest("Invalid request: send either 'input' or 'messages'.", param="messages")
    if body.messages is not None:
        return [await _conversation(exchange, body, card)]
    if body.input is None:
        raise BadRequest(
            "Missing required field 'input'; add it, or 'messages'.", param="input", code="missing_required_parameter"
        )
    for name in sorted(_OF_MESSAGES & body.model_fields_set):
        if getattr(body, name):
            raise BadRequest(f"Invalid {name!r}: it is for 'messages'; leave it out.", param=name)
    given = body.input
    return await exchange.aside(lambda: [_prompt(each, body) for each in given])


async def _conversation(exchange: Exchange, body: EmbeddingsBody, card: ModelCard) -> Prompt:
    """The conversation as the model's chat template writes it, without an open turn unless that is asked for."""
    check_special_tokens(body.add_special_tokens)
    await check_objects(exchange, card)
    chat = ChatInput(
        messages=body.messages or [],
        template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
    )
    prompt, _ = await inlined_prompt(exchange, chat, card)
    return prompt


def _prompt(given: PromptInput, body: EmbeddingsBody) -> Prompt:
    if isinstance(given, str):
        return TextPrompt(text=given, add_special_tokens=body.add_special_tokens is not False)
    return TokensPrompt(token_ids=TokenIds(given))


def _written(vector: bytes, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector).decode()
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
