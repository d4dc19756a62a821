"""How a model reads text: /tokenize, /detokenize, /tokenizer_info, and the prompts of /…/completions/render."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NotRequired

from fastapi import Response
from pydantic import Field
from typing_extensions import TypedDict

from deployments.core.calls import Prompt, TextPrompt
from deployments.core.client import TokenPiece
from deployments.core.errors import BadRequest
from deployments.core.model_card import ModelCard
from deployments.openai.chat.plan import chat_input
from deployments.openai.chat.prompt import check_special_tokens, read_chat
from deployments.openai.chat.schema import ChatBody, TemplateFields
from deployments.openai.completions.plan import completion_prompt
from deployments.openai.completions.schema import CompletionBody
from deployments.openai.fields.fields import IdList, RequestBody
from deployments.openai.fields.other_servers import Rows
from deployments.openai.fields.other_servers_table import DETOKENIZE, TOKENIZE
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_answer, written


class TokenizeBody(TemplateFields):
    """A text, or the messages of a chat with the fields that shape its prompt."""

    foreign: ClassVar[Rows] = TOKENIZE
    computes: ClassVar[bool] = False

    prompt: str | None = Field(default=None, description="Text to tokenize.")
    messages: list[Any] | None = Field(default=None, description="A conversation in place of prompt.")
    add_special_tokens: bool | None = Field(default=None, description="Begin a prompt with BOS; true by default.")
    return_token_strs: bool = Field(default=False, description="Also report the tokens as the vocabulary spells them.")


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: Sequence[int]
    token_strs: NotRequired[list[str]]


class DetokenizeBody(RequestBody):
    """Token ids."""

    foreign: ClassVar[Rows] = DETOKENIZE
    computes: ClassVar[bool] = False

    tokens: IdList = Field(description="Token ids.")
    return_pieces: bool = Field(
        default=False, description="Also report each token's text and bytes, as log-probabilities do."
    )


class Piece(TypedDict):
    token: str
    bytes: list[int]


class Detokenized(TypedDict):
    prompt: str
    pieces: NotRequired[list[Piece]]


class RenderedPrompt(TypedDict):
    """A prompt as the model would get it."""

    model: str
    prompt: NotRequired[str | None]
    token_ids: Sequence[int]
    count: int
    max_model_len: int


class RenderedPrompts(TypedDict):
    data: list[RenderedPrompt]


async def tokenize(exchange: Exchange) -> Response:
    """The token ids of a text or of a chat's prompt."""
    body, card = await exchange.read(TokenizeBody)
    prompt = await _prompt(exchange, body, card)

    async def answer() -> bytes:
        rendered = await exchange.client.render(card.id, prompt)
        ids = rendered.token_ids
        shape: Tokenized = {"count": len(ids), "max_model_len": rendered.max_model_len, "tokens": ids}
        if body.return_token_strs:
            shape["token_strs"] = list(await exchange.client.spell(card.id, ids))
        return await written(shape)

    return await json_answer(exchange, answer())


async def detokenize(exchange: Exchange) -> Response:
    """The text of token ids, special tokens included."""
    body, card = await exchange.read(DetokenizeBody)

    async def answer() -> bytes:
        if body.return_pieces:  # Both calls are answered by the version that answers this one.
            await exchange.client.tokenizer_info(card.id)
        text = await exchange.client.detokenize(card.id, body.tokens)
        pieces = await exchange.client.pieces(card.id, body.tokens) if body.return_pieces else None
        return await written(await exchange.aside(lambda: _detokenized(text, pieces)))

    return await json_answer(exchange, answer())


def _detokenized(text: str, pieces: Sequence[TokenPiece] | None) -> Detokenized:
    shape: Detokenized = {"prompt": text}
    if pieces is not None:
        shape["pieces"] = [{"token": piece.token, "bytes": list(piece.bytes)} for piece in pieces]
    return shape


async def tokenizer_info(exchange: Exchange) -> Response:
    """The tokenizer's class, special tokens, chat template and limit."""
    card = exchange.find_model(exchange.request.query_params.get("model"))

    async def answer() -> bytes:
        return await written(await exchange.client.tokenizer_info(card.id))

    return await json_answer(exchange, answer())


async def render_chat(exchange: Exchange) -> Response:
    """The exact prompt a chat completion with this body would give."""
    body, card = await exchange.read(ChatBody)
    prompt = await read_chat(exchange, await chat_input(exchange, body, body.messages, card), card)

    async def answer() -> bytes:
        return await written(await _rendered(exchange, card, prompt))

    return await json_answer(exchange, answer())


async def render_completion(exchange: Exchange) -> Response:
    """The exact prompts a text completion with this body would give."""
    body, card = await exchange.read(CompletionBody)

    async def answer() -> bytes:
        prompts = [await _rendered(exchange, card, completion_prompt(prompt, body)) for prompt in body.prompt]
        shape: RenderedPrompts = {"data": prompts}
        return await written(shape)

    return await json_answer(exchange, answer())


async def _rendered(exchange: Exchange, card: ModelCard, prompt: Prompt) -> RenderedPrompt:
    rendered = await exchange.client.render(card.id, prompt)
    return {
        "model": card.id,
        "prompt": rendered.text,
        "token_ids": rendered.token_ids,
        "count": len(rendered.token_ids),
        "max_model_len": rendered.max_model_len,
    }


async def _prompt(exchange: Exchange, body: TokenizeBody, card: ModelCard) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("Invalid request: send either 'prompt' or 'messages'.", param="prompt")
    if body.prompt is not None:
        return TextPrompt(text=body.prompt, add_special_tokens=body.add_special_tokens is not False)
    check_special_tokens(body.add_special_tokens)
    return await read_chat(exchange, await chat_input(exchange, body, body.messages or [], card), card)
