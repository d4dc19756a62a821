"""Events that answer a call to a model. Plain dataclasses of the standard library.

A generation call is answered by `Accepted` first (every prompt is encoded and fits), then `PromptScores` if the call
asks for them, `Delta`s of all choices interleaved and `Captured` before the last one of each, then `Finished`.
`Failed` ends the stream at any point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.core.errors import TroupeError
from deployments.core.logprobs import TokenLogprob
from deployments.core.transcript import TranscriptionStarted, TranscriptSegment

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Every prompt is encoded and fits; nothing is computed yet.

    Attributes:
        prompt_token_ids: of each prompt; `TokenIds`, which cross as one block, where they can be many.
        prompt_texts: of each prompt, as the template rendered it; None where only ids were given.
        max_model_len: positions a request of this model may use.
        fingerprint: of the model that answers, see `deployments.registry.version.fingerprint`.
        answers: how the model writes tool calls and reasoning, and how that was found.
    """

    prompt_token_ids: tuple[Sequence[int], ...]
    prompt_texts: tuple[str | None, ...]
    max_model_len: int = 0
    fingerprint: str = ""
    answers: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """The log-probabilities of a choice's prompt tokens; the first has none."""

    choice: int = 0
    scores: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The new text and tokens of a choice since its last delta.

    `text` may lag behind `token_ids`: an unfinished UTF-8 character or a possible stop string is held back.
    The last delta of a choice carries `finish_reason`, and in `stop_reason` the stop string or token id that ended it
    (None for the model's own terminators).
    """

    choice: int = 0
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What an engine has captured of a choice, before its last delta; the host makes a `Captured` of it.

    `recording` is a `deployments.engine.inside.recording.Recording`.
    """

    choice: int = 0
    recording: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """Where the captured states of a choice are, as the client gets it; before the choice's last delta."""

    choice: int = 0
    handle: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Durations of a request, in seconds since the model received it, including waiting and encoding.

    `tokens_per_second` is over all choices and the whole time.
    """

    time_to_first_token: float
    total_time: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of a whole request.

    `cached_tokens` are the prompt tokens whose computation was reused, `audio_tokens` those that stand for sound;
    `reasoning_tokens` are a part of the completion's.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    audio_tokens: int = 0
    reasoning_tokens: int = 0
    timings: Timings | None = None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """All choices have ended."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The request has failed; nothing follows."""

    error: TroupeError


Event = Accepted | PromptScores | Delta | Captured | TranscriptionStarted | TranscriptSegment | Finished | Failed


EngineEvent = PromptScores | Delta | Recorded | Failed


def is_last(event: EngineEvent) -> bool:
    """Whether an engine emits nothing after this event of a choice."""
    return isinstance(event, Failed) or (isinstance(event, Delta) and event.finish_reason is not None)
