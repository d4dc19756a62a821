"""POST /v1/score: how likely a model finds each of some fixed continuations."""

from __future__ import annotations

import math
from typing import Any, ClassVar
from uuid import uuid4

from fastapi import Response
from pydantic import Field
from typing_extensions import TypedDict

from deployments.errors import BadRequest, ContextOverflow, UnsupportedParameter
from deployments.messages import GenerateCall, ModelCard, Prompt, SamplingParams, TextPrompt, TokensPrompt
from deployments.openai.answer import json_answer, to_json
from deployments.openai.chat import chat_prompt
from deployments.openai.chat_schema import ChatBody
from deployments.openai.choices import Choice, gather
from deployments.openai.exchange import Exchange
from deployments.openai.fields import RequestBody, parse_fields
from deployments.openai.logprobs import finite
from deployments.openai.usage import UsageObject, usage_object

_MAX_CHOICES = 256


class ScoreBody(RequestBody):
    """A text or a conversation, and the continuations to choose from."""

    bookkeeping: ClassVar[frozenset[str]] = frozenset({"user", "metadata", "request_id"})

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
    prompt = _prompt(exchange, body, card)
    return await json_answer(exchange, _scores(exchange, body, card, prompt))


def _prompt(exchange: Exchange, body: ScoreBody, card: ModelCard) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("Invalid request: send either 'prompt' or 'messages'.", param="prompt")
    if not all(body.choices):
        raise BadRequest("Invalid 'choices': a choice is empty.", param="choices")
    if body.prompt is not None:
        return TextPrompt(text=body.prompt)
    chat, _ = parse_fields(ChatBody, body.model_dump(exclude_unset=True, exclude={"prompt", "choices"}))
    conversation = chat_prompt(chat, card, exchange.options, None)
    if any(isinstance(message["content"], list) for message in conversation.messages):
        raise UnsupportedParameter("Continuations are scored after texts only; leave the images out.", param="messages")
    return conversation


async def _scores(exchange: Exchange, body: ScoreBody, card: ModelCard, prompt: Prompt) -> bytes:
    client = exchange.client
    rendered = await client.render(card.id, prompt)
    if not rendered.token_ids:
        raise BadRequest("The prompt is empty: nothing to continue.", param="prompt")
    starts: list[int] = []
    prompts: list[TokensPrompt] = []
    for choice in body.choices:
        # Encoded as one text, because a token may reach across the border; the border is where the ids part.
        text = (rendered.text or "") + choice
        whole = await client.render(card.id, TextPrompt(text=text, add_special_tokens=isinstance(prompt, TextPrompt)))
        if len(whole.token_ids) > whole.max_model_len:
            raise ContextOverflow(whole.max_model_len, len(whole.token_ids), param="choices")
        starts.append(_common(rendered.token_ids, whole.token_ids))
        prompts.append(TokensPrompt(token_ids=whole.token_ids))
    call = GenerateCall(
        request_id=f"score-{uuid4().hex}",
        model=card.id,
        prompts=tuple(prompts),
        sampling=SamplingParams(max_tokens=0, prompt_logprobs=0),
    )
    gathered = await gather(exchange.generate(call), len(prompts))
    sums = [_sum(choice, start) for choice, start in zip(gathered.choices, starts, strict=True)]
    highest = max(total for total, _ in sums)
    weights = [math.exp(total - highest) for total, _ in sums]
    shape: Scores = {
        "object": "list",
        "model": body.model or card.id,
        "best": max(range(len(sums)), key=lambda index: sums[index][0]),
        "data": [
            {
                "index": index,
                "choice": choice,
                "logprob": total,
                "tokens": count,
                "probability": weights[index] / math.fsum(weights),
            }
            for index, (choice, (total, count)) in enumerate(zip(body.choices, sums, strict=True))
        ],
        "usage": usage_object(gathered.usage),
    }
    return to_json(shape)


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens two prompts share; at least one, which nothing predicts, and never all of the second."""
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    return max(1, min(shared, len(second) - 1))


def _sum(choice: Choice, start: int) -> tuple[float, int]:
    scores = [token for token in (choice.prompt_scores or ())[start:] if token is not None]
    return math.fsum(finite(token.logprob) for token in scores), len(scores)
