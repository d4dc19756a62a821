"""The transcription objects: https://platform.openai.com/docs/api-reference/audio"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NotRequired

from pydantic import BeforeValidator, Field, WithJsonSchema
from typing_extensions import TypedDict

from deployments.openai.fields.fields import MAX_WHOLE, Real, Seed, TurnFields, Whole
from deployments.openai.fields.other_servers import Rows
from deployments.openai.fields.other_servers_table import TRANSCRIPTIONS, TRANSLATIONS

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
LISTS = frozenset(
    {"timestamp_granularities", "include", "keywords", "languages", "known_speaker_names", "known_speaker_references"}
)


def _spoken_language(value: object) -> object:
    """What clients write who mean that nobody has said."""
    return None if isinstance(value, str) and value.strip().lower() in ("null", "none", "auto") else value


class TranslationBody(TurnFields):
    """A recording, and how it is put into English text. Fields after `temperature` are vLLM's, with its meaning."""

    foreign: ClassVar[Rows] = TRANSLATIONS

    file: Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})] = Field(
        description="wav, flac, mp3, ogg or another format of libsndfile."
    )
    language: Annotated[str | None, BeforeValidator(_spoken_language)] = Field(
        default=None, description="Language of the recording, as an ISO 639-1 code or an English name; None guesses it."
    )
    prompt: str = Field(default="", description="Text before the recording: it guides spelling and style.")
    response_format: Format = Field(default="json", description="json, text, verbose_json, srt or vtt.")
    temperature: Annotated[Real, Field(ge=0, le=2)] = Field(default=0.0, description="0 is greedy.")
    stream: bool = Field(default=False, description="Send the text as events while it is written.")
    stream_include_usage: bool = Field(default=False, description="Accepted; a stream's last event has the usage.")
    stream_continuous_usage_stats: bool = Field(default=False, description="Accepted, no effect.")
    top_p: Annotated[Real, Field(ge=0, le=1)] = Field(default=1.0, description="As in text generation; 1 is off.")
    top_k: Annotated[Whole, Field(ge=-1, le=MAX_WHOLE)] = Field(
        default=0, description="As in text generation; 0 and -1 are off."
    )
    min_p: Annotated[Real, Field(ge=0, le=1)] = Field(default=0.0, description="As in text generation; 0 is off.")
    repetition_penalty: Annotated[Real, Field(gt=0)] = Field(
        default=1.0, description="As in text generation; 1 is off."
    )
    presence_penalty: Annotated[Real, Field(ge=-2, le=2)] = Field(
        default=0.0, description="As in text generation; 0 is off."
    )
    frequency_penalty: Annotated[Real, Field(ge=-2, le=2)] = Field(
        default=0.0, description="As in text generation; 0 is off."
    )
    seed: Seed = Field(default=None, description="The same seed gives the same text.")
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=MAX_WHOLE)] | None = Field(
        default=None, description="Tokens of each window of the recording."
    )


class TranscriptionBody(TranslationBody):
    """A recording, and how it is written down."""

    foreign: ClassVar[Rows] = TRANSCRIPTIONS

    include: list[Literal["logprobs"]] = Field(
        default_factory=list, description="`logprobs`: of the tokens; with json only."
    )
    timestamp_granularities: list[Literal["word", "segment"]] = Field(
        default_factory=list, description="With verbose_json only; `segment` if left out."
    )


class DurationUsage(TypedDict):
    type: Literal["duration"]
    seconds: float


class InputDetails(TypedDict):
    audio_tokens: int
    text_tokens: int


class TokensUsage(TypedDict):
    type: Literal["tokens"]
    input_tokens: int
    input_token_details: InputDetails
    output_tokens: int
    total_tokens: int


class TokenEntry(TypedDict):
    token: str
    bytes: list[int]
    logprob: float


class SegmentObject(TypedDict):
    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class WordObject(TypedDict):
    word: str
    start: float
    end: float


class Transcription(TypedDict):
    """The answer to json, and with its further fields to verbose_json. Other formats are plain text."""

    text: str
    usage: NotRequired[DurationUsage]
    logprobs: NotRequired[list[TokenEntry]]
    task: NotRequired[Literal["transcribe", "translate"]]
    language: NotRequired[str]
    duration: NotRequired[float]
    segments: NotRequired[list[SegmentObject]]
    words: NotRequired[list[WordObject]]


class TranscriptEvent(TypedDict):
    """An event of a stream: `delta` in transcript.text.delta, all else in transcript.text.done."""

    type: Literal["transcript.text.delta", "transcript.text.done"]
    delta: NotRequired[str]
    text: NotRequired[str]
    logprobs: NotRequired[list[TokenEntry]]
    usage: NotRequired[TokensUsage]
    task: NotRequired[Literal["transcribe", "translate"]]
    language: NotRequired[str]
    duration: NotRequired[float]
    segments: NotRequired[list[SegmentObject]]
    words: NotRequired[list[WordObject]]
