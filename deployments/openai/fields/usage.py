"""Token counts in answers."""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict

from deployments.core.events import Accepted, Delta, Usage


class PromptDetails(TypedDict):
    cached_tokens: int


class CompletionDetails(TypedDict):
    reasoning_tokens: int


class UsageObject(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: NotRequired[CompletionDetails]
    time_to_first_token: NotRequired[float]
    total_time: NotRequired[float]
    tokens_per_second: NotRequired[float]


def usage_object(usage: Usage) -> UsageObject:
    shape: UsageObject = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens:
        shape["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    if usage.timings is not None:
        shape["time_to_first_token"] = usage.timings.time_to_first_token
        shape["total_time"] = usage.timings.total_time
        shape["tokens_per_second"] = usage.timings.tokens_per_second
    return shape


class RunningUsage:
    """Token counts of a stream under way, and the chunks that report them.

    Args:
        last: the counts are wanted in a last chunk.
        every: they are wanted in every chunk; without `last` in none.

    Attributes:
        last: as given.
        every: whether every chunk has counts.
    """

    def __init__(self, *, last: bool, every: bool) -> None:
        self.last = last
        self.every = last and every
        self._prompt = 0
        self._completion = 0
        self._cached = 0
        self._reasoning = 0

    def accept(self, accepted: Accepted) -> None:
        self._prompt = sum(len(ids) for ids in accepted.prompt_token_ids)

    def add(self, delta: Delta) -> None:
        self._completion += len(delta.token_ids)
        self._cached = max(self._cached, delta.cached_tokens)
        self._reasoning += delta.reasoning_tokens

    def field(self) -> dict[str, Any]:
        """The field `usage` of a chunk: the counts so far, null, or no field."""
        if self.every:
            return {"usage": usage_object(self.so_far)}
        return {"usage": None} if self.last else {}

    @property
    def so_far(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            cached_tokens=self._cached,
            reasoning_tokens=self._reasoning,
        )
