"""Collects the choices of an answer from their deltas."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from deployments.core.events import Accepted, Captured, Delta, Event, Finished, FinishReason, PromptScores, Usage
from deployments.core.logprobs import TokenLogprob


@dataclass(slots=True)
class Choice:
    """One finished choice."""

    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    stop_reason: str | int | None = None
    prompt_scores: tuple[TokenLogprob | None, ...] | None = None
    capture: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Gathered:
    """All results of a call."""

    accepted: Accepted
    choices: list[Choice]
    usage: Usage


async def gather(events: AsyncGenerator[Event, None], count: int) -> Gathered:
    """All events of a call of `count` choices."""
    choices = [Choice() for _ in range(count)]
    texts: list[list[str]] = [[] for _ in range(count)]
    accepted = Accepted(prompt_token_ids=(), prompt_texts=())
    usage = Usage(prompt_tokens=0)
    async with aclosing(events):
        async for event in events:
            match event:
                case Accepted():
                    accepted = event
                case PromptScores():
                    choices[event.choice].prompt_scores = event.scores
                case Captured():
                    choices[event.choice].capture = event.handle
                case Delta():
                    texts[event.choice].append(event.text)
                    _add(choices[event.choice], event)
                case Finished():
                    usage = event.usage
    for choice, pieces in zip(choices, texts, strict=True):
        choice.text = "".join(pieces)
    return Gathered(accepted, choices, usage)


def _add(choice: Choice, delta: Delta) -> None:
    choice.token_ids = [*choice.token_ids, *delta.token_ids] if choice.token_ids else delta.token_ids
    choice.logprobs.extend(delta.logprobs or ())
    if delta.finish_reason is not None:
        choice.finish_reason = delta.finish_reason
        choice.stop_reason = delta.stop_reason
