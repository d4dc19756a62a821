"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import math
import struct
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Response
from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from deployments.errors import BadRequest
from deployments.messages import Prompt, TextPrompt, TokensPrompt
from deployments.openai.answer import json_answer, to_json
from deployments.openai.completions_schema import PromptInput, prompt_inputs
from deployments.openai.exchange import Exchange
from deployments.openai.fields import RequestBody, TokenId, Whole

_MAX_INPUTS = 2048


class EmbeddingsBody(RequestBody):
    """Texts to be turned into vectors."""

    bookkeeping: ClassVar[frozenset[str]] = frozenset({"user", "request_id"})
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "truncate_prompt_tokens": (),
        "truncation_side": (),
        "priority": (0,),
        "cache_salt": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "mm_processor_kwargs": ({},),
    }

    input: Annotated[
        list[PromptInput],
        BeforeValidator(prompt_inputs, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]]),
    ] = Field(description="One or several texts, or lists of token ids.", examples=["a text"], max_length=_MAX_INPUTS)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Keep so many dimensions and bring the vector back to length 1."
    )
    add_special_tokens: bool = True


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
    """The vectors of texts."""
    body, card = await exchange.read(EmbeddingsBody)
    prompts = [_prompt(given, body) for given in body.input]

    async def answer() -> bytes:
        found = await exchange.client.embed(card.id, prompts)
        vectors = [_shortened(vector, body.dimensions) for vector in found.vectors]
        shape: EmbeddingList = {
            "object": "list",
            "model": body.model or card.id,
            "data": [
                {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens},
        }
        return to_json(shape)

    return await json_answer(exchange, answer())


def _prompt(given: PromptInput, body: EmbeddingsBody) -> Prompt:
    if isinstance(given, str):
        return TextPrompt(text=given, add_special_tokens=body.add_special_tokens)
    return TokensPrompt(token_ids=tuple(given))


def _shortened(vector: bytes, dimensions: int | None) -> bytes:
    length = len(vector) // 4
    if dimensions is None or dimensions == length:
        return vector
    if dimensions > length:
        raise BadRequest(
            f"Invalid 'dimensions': this model's vectors have {length}; got {dimensions}.", param="dimensions"
        )
    kept = _floats(vector)[:dimensions]
    norm = math.sqrt(math.fsum(value * value for value in kept)) or 1.0
    return struct.pack(f"<{dimensions}f", *(value / norm for value in kept))


def _written(vector: bytes, encoding: str) -> list[float] | str:
    return base64.b64encode(vector).decode() if encoding == "base64" else list(_floats(vector))


def _floats(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)
