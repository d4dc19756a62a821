"""The events of a transcription."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.core.logprobs import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptionStarted:
    """A recording is decoded: the English name of its language (such as `english`) and its length in seconds.

    Attributes:
        fingerprint: of the model that answers.
    """

    language: str
    duration: float
    fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of a recording between two times, in seconds from its beginning.

    Attributes:
        seek: the frame (of 10 ms) at which the window that has the segment begins.
        text: with the space that Whisper writes before it.
        token_ids: times included.
        avg_logprob, compression_ratio, no_speech_prob: of its window; temperature as asked.
    """

    seek: int
    start: float
    end: float
    text: str
    token_ids: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


@dataclass(frozen=True, slots=True)
class Word:
    """A word and when it is said, in seconds from the recording's beginning."""

    word: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptSegment:
    """The new text of a transcription. The joined texts of all events are the whole text."""

    text: str = ""
    segments: tuple[Segment, ...] = ()
    words: tuple[Word, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
