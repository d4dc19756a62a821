"""POST /v1/score: how likely a model finds each of some fixed continuations."""

from __future__ import annotations

from typing import Any, ClassVar

from fastapi import Response
from pydantic import Field
from typing_extensions import TypedDict

from deployments.core.calls import Prompt, TextPrompt
from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.core.model_card import ModelCard
from deployments.openai.chat.messages import has_media
from deployments.openai.chat.plan import chat_prompt, check_objects
from deployments.openai.chat.schema import ChatBody
from deployments.openai.fields.fields import RequestBody, parse_fields
from deployments.openai.fields.foreign import Rows
from deployments.openai.fields.foreign_table import SCORE
from deployments.openai.fields.usage import UsageObject, usage_object
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_answer, to_json
from deployments.openai.scores.continuations import score_continuations, shares

_MAX_CHOICES = 256


class ScoreBody(RequestBody):
    """A text or a conversation, and the continuations to choose from."""

    foreign: ClassVar[Rows] = SCORE

    prompt: str | None = None
    messages: list[Any] | None = None
    choices: list[str] = Field(min_length=1, max_length=_MAX_CHOICES, examples=[["42", "43"]])
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    continue_final_message: bool = False


class ScoredChoice(TypedDict):
    """A continuation: the sum of its tokens' log-probabilities, their count, and its share among the choices."""

    index: int
    choice: str
    logprob: float
    tokens: int
    probability: float


class Scores(TypedDict):
    object: str
    model: str
    best: int
    data: list[ScoredChoice]
    usage: UsageObject


async def create_score(exchange: Exchange) -> Response:
    """The log-probability of each of some fixed continuations."""
    body, card = await exchange.read(ScoreBody)
    await check_objects(exchange, card)
    prompt = await exchange.aside(lambda: _prompt(exchange, body, card))
    return await json_answer(exchange, _scores(exchange, body, card, prompt))


def _prompt(exchange: Exchange, body: ScoreBody, card: ModelCard) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("Invalid request: send either 'prompt' or 'messages'.", param="prompt")
    if not all(body.choices):
        raise BadRequest("Invalid 'choices': a choice is empty.", param="choices")
    if body.prompt is not None:
        return TextPrompt(text=body.prompt)
    fields = {name: getattr(body, name) for name in body.model_fields_set - {"prompt", "choices"}}
    chat, _ = parse_fields(ChatBody, fields)
    conversation = chat_prompt(chat, card, exchange.options, None)
    if has_media(conversation.messages):
        raise UnsupportedParameter("Continuations are scored after texts only; leave the images out.", param="messages")
    return conversation


async def _scores(exchange: Exchange, body: ScoreBody, card: ModelCard, prompt: Prompt) -> bytes:
    rendered = await exchange.client.render(card.id, prompt)
    if not rendered.token_ids:
        raise BadRequest("The prompt is empty: nothing to continue.", param="prompt")
    plain = isinstance(prompt, TextPrompt)
    sums, usage = await score_continuations(exchange, card, rendered, body.choices, param="choices", plain=plain)
    probabilities = shares([total for total, _ in sums])
    shape: Scores = {
        "object": "list",
        "model": body.model or card.id,
        "best": max(range(len(sums)), key=lambda index: sums[index][0]),
        "data": [
            {"index": index, "choice": choice, "logprob": total, "tokens": count, "probability": probabilities[index]}
            for index, (choice, (total, count)) in enumerate(zip(body.choices, sums, strict=True))
        ],
        "usage": usage_object(usage),
    }
    return to_json(shape)
