"""The check of speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from deployments.cli.doctor.finding import Finding, fine
from deployments.cli.doctor.generation import random_prompts
from deployments.cli.doctor.subject import Subject
from deployments.core.calls import Prompt

_MANY = 16
_TOKENS = 32
_PATIENCE_S = 10.0
"""Seconds after which a measurement ends with what it has."""


async def speed(subject: Subject) -> Finding:
    """Tokens per second of one request and of sixteen, and the time to the first token."""
    subject.need_text()
    first, *others = random_prompts(subject, _MANY + 1)
    one, wait = await _measured(subject, [first])
    many, _ = await _measured(subject, others)
    return fine(
        f"{one:,.1f} tokens/s with 1 sequence, {many:,.1f} with {_MANY}; first token after {1000 * wait:.1f} ms.",
        tokens_per_second_1=round(one, 2),
        tokens_per_second_16=round(many, 2),
        time_to_first_token_s=round(wait, 5),
    )


async def _measured(subject: Subject, prompts: Sequence[Prompt]) -> tuple[float, float]:
    """Tokens per second of requests sent together, and seconds to the first token of the first."""
    deadline = time.monotonic() + _PATIENCE_S
    sent = [subject.answer(prompt, max_tokens=_TOKENS, endless=True, deadline=deadline) for prompt in prompts]
    answers = await asyncio.gather(*sent)
    seconds = max(answer.total for answer in answers)
    return sum(len(answer.token_ids) for answer in answers) / max(seconds, 1e-6), answers[0].first
