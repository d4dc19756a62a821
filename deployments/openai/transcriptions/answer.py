"""POST /v1/audio/transcriptions and /v1/audio/translations."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

from fastapi import Response

from deployments.core.calls import TranscribeCall
from deployments.core.events import Finished, Usage
from deployments.core.logprobs import TokenLogprob
from deployments.core.model_card import ModelCard
from deployments.core.transcript import Segment, TranscriptionStarted, TranscriptSegment, Word
from deployments.openai.fields.logprobs import finite
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import Chunks, build, json_answer, sse, sse_answer, text_answer, to_json
from deployments.openai.transcriptions.plan import Task, transcription_plan
from deployments.openai.transcriptions.schema import (
    LISTS,
    DurationUsage,
    SegmentObject,
    TokenEntry,
    TokensUsage,
    Transcription,
    TranscriptionBody,
    TranslationBody,
    WordObject,
)
from deployments.openai.transcriptions.subtitles import VTT_HEAD, srt_block, vtt_block

_MANY = 1000


async def create_transcription(exchange: Exchange) -> Response:
    """Write down what is said in a recording, at once or as a stream."""
    body, card = await exchange.read_form(TranscriptionBody, LISTS)
    return await _respond(exchange, body, card, "transcribe")


async def create_translation(exchange: Exchange) -> Response:
    """Put what is said in a recording into English text."""
    body, card = await exchange.read_form(TranslationBody, LISTS)
    return await _respond(exchange, body, card, "translate")


async def _respond(exchange: Exchange, body: TranslationBody, card: ModelCard, task: Task) -> Response:
    call = transcription_plan(body, card, exchange.options, task)
    transcript = Transcript(exchange, body, call)
    if body.stream:
        return await sse_answer(exchange, transcript.chunks())
    if body.response_format in ("json", "verbose_json"):
        return await json_answer(exchange, transcript.answer())
    kind = "text/vtt" if body.response_format == "vtt" else "text/plain"
    return await text_answer(exchange, transcript.answer(), kind)


class Transcript:
    """One transcription under way."""

    def __init__(self, exchange: Exchange, body: TranslationBody, call: TranscribeCall) -> None:
        self._exchange = exchange
        self._call = call
        self._format = body.response_format
        self._heard = TranscriptionStarted(language="", duration=0.0)
        self._usage = Usage(prompt_tokens=0)
        self._text = Trimmed()
        self._shown: list[str] = []
        self._segments: list[Segment] = []
        self._words: list[Word] = []
        self._logprobs: list[TokenLogprob] = []

    async def answer(self) -> bytes:
        """The whole answer in the format that was asked for."""
        async with aclosing(self.chunks()) as chunks:
            async for _ in chunks:
                pass
        if self._format not in ("json", "verbose_json"):
            return self._whole().encode()
        return await build(lambda: to_json(self._transcription()), large=self._large)

    @property
    def _large(self) -> bool:
        """Whether the answer is so long that it is built in a thread."""
        return len(self._segments) + len(self._words) + len(self._logprobs) > _MANY

    def _transcription(self) -> Transcription:
        usage: DurationUsage = {"type": "duration", "seconds": round(self._heard.duration, 3)}
        answer: Transcription = {"text": self._text.whole, "usage": usage}
        if self._call.logprobs:
            answer["logprobs"] = _entries(self._logprobs)
        if self._format == "verbose_json":
            answer.update(self._details())
        return answer

    async def chunks(self) -> Chunks:
        """The events of a stream."""
        if self._format == "vtt":
            yield self._show(VTT_HEAD)
        async with aclosing(self._exchange.generate(self._call)) as events:
            async for event in events:
                match event:
                    case TranscriptionStarted():
                        self._heard = event
                    case TranscriptSegment():
                        if gained := self._add(event):
                            yield self._show(gained, event.logprobs)
                    case Finished():
                        self._usage = event.usage
        yield await build(lambda: sse(self._done()), large=self._large)

    def _add(self, spoken: TranscriptSegment) -> str:
        """Take note of a piece; returns what the answer's text gains by it."""
        text = self._text.add(spoken.text)
        first = len(self._segments) + 1
        self._segments += spoken.segments
        self._words += spoken.words
        self._logprobs += spoken.logprobs
        if self._format == "srt":
            return "".join(srt_block(number, segment) for number, segment in enumerate(spoken.segments, first))
        if self._format == "vtt":
            return "".join(vtt_block(segment) for segment in spoken.segments)
        return text

    def _show(self, text: str, logprobs: Iterable[TokenLogprob] = ()) -> bytes:
        self._shown.append(text)
        event: dict[str, Any] = {"type": "transcript.text.delta", "delta": text}
        if self._call.logprobs:
            event["logprobs"] = _entries(logprobs)
        return sse(event)

    def _done(self) -> dict[str, Any]:
        event: dict[str, Any] = {"type": "transcript.text.done", "text": self._whole(), "usage": _tokens(self._usage)}
        if self._call.logprobs:
            event["logprobs"] = _entries(self._logprobs)
        if self._format == "verbose_json":
            event.update(self._details())
        return event

    def _whole(self) -> str:
        return "".join(self._shown)

    def _details(self) -> Any:
        """What verbose_json has beside the text."""
        details: dict[str, Any] = {
            "task": self._call.task,
            "language": "english" if self._call.task == "translate" else self._heard.language,
            "duration": round(self._heard.duration, 3),
        }
        if self._call.segments:
            details["segments"] = [_segment(number, segment) for number, segment in enumerate(self._segments)]
        if self._call.words:
            words: list[WordObject] = [{"word": w.word, "start": w.start, "end": w.end} for w in self._words]
            details["words"] = words
        return details


class Trimmed:
    """A text without white space at its ends, from pieces of it.

    Attributes:
        whole: the text so far.
    """

    def __init__(self) -> None:
        self.whole = ""
        self._held = ""

    def add(self, piece: str) -> str:
        """What the text gains; white space is held back until something follows it."""
        text = self._held + piece if self.whole else piece.lstrip()
        gained = text.rstrip()
        self._held = text[len(gained) :]
        self.whole += gained
        return gained


def _segment(number: int, segment: Segment) -> SegmentObject:
    return {
        "id": number,
        "seek": segment.seek,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.token_ids),
        "temperature": segment.temperature,
        "avg_logprob": finite(segment.avg_logprob),
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }


def _entries(logprobs: Iterable[TokenLogprob]) -> list[TokenEntry]:
    return [{"token": each.token, "bytes": list(each.bytes), "logprob": finite(each.logprob)} for each in logprobs]


def _tokens(usage: Usage) -> TokensUsage:
    return {
        "type": "tokens",
        "input_tokens": usage.prompt_tokens,
        "input_token_details": {
            "audio_tokens": usage.audio_tokens,
            "text_tokens": usage.prompt_tokens - usage.audio_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
