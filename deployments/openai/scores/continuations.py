"""How likely a model finds each of some fixed continuations of a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from deployments.core.calls import GenerateCall, SamplingParams, TextPrompt, TokensPrompt
from deployments.core.client import Rendered
from deployments.core.errors import ContextOverflow
from deployments.core.events import Usage
from deployments.core.model_card import ModelCard
from deployments.openai.fields.choices import Choice, gather
from deployments.openai.fields.logprobs import finite
from deployments.openai.http.exchange import Exchange

_PART = 4096
Score = tuple[float, int, Mapping[str, Any] | None]
"""The sum of a continuation's log-probabilities, how many tokens it has, and the handle of what was captured."""


async def score_continuations(
    exchange: Exchange,
    card: ModelCard,
    rendered: Rendered,
    texts: Sequence[str],
    *,
    param: str,
    plain: bool,
    sampling: SamplingParams | None = None,
) -> tuple[list[Score], Usage]:
    """The scores of texts after a rendered prompt, in their order, and the tokens that took.

    Args:
        sampling: what is captured and changed inside the model.
        param: the request field that holds the texts.
        plain: the prompt is a text of the request, which the model's special tokens belong to.

    Raises:
        ContextOverflow: prompt and text are longer than the context.
    """
    starts: list[int] = []
    prompts: list[TokensPrompt] = []
    for text in texts:
        # Encoded as one text, because a token may reach across the place where they meet: there the ids differ.
        prompt = TextPrompt(text=(rendered.text or "") + text, add_special_tokens=plain)
        whole = await exchange.client.render(card.id, prompt)
        if len(whole.token_ids) > whole.max_model_len:
            raise ContextOverflow(whole.max_model_len, len(whole.token_ids), param=param)
        starts.append(_common(rendered.token_ids, whole.token_ids))
        prompts.append(TokensPrompt(token_ids=whole.token_ids))
    call = GenerateCall(
        request_id=f"score-{uuid4().hex}",
        model=card.id,
        prompts=tuple(prompts),
        sampling=replace(sampling or SamplingParams(), max_tokens=0, prompt_logprobs=0),
        owner=exchange.owner,
    )
    gathered = await gather(exchange.generate(call), len(prompts))
    return [_sum(choice, start) for choice, start in zip(gathered.choices, starts, strict=True)], gathered.usage


def shares(logprobs: Sequence[float]) -> list[float]:
    """What part of their common probability each of some log-probabilities has."""
    highest = max(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    return [weight / math.fsum(weights) for weight in weights]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two prompts share; at least one, which nothing predicts, and never all of the second."""
    shared, most = 0, min(len(first), len(second))
    while shared + _PART <= most and first[shared : shared + _PART] == second[shared : shared + _PART]:
        shared += _PART
    while shared < most and first[shared] == second[shared]:
        shared += 1
    return max(1, min(shared, len(second) - 1))


def _sum(choice: Choice, start: int) -> Score:
    scores = [token for token in (choice.prompt_scores or ())[start:] if token is not None]
    return math.fsum(finite(token.logprob) for token in scores), len(scores), choice.capture
