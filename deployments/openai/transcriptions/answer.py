"""POST /v1/audio/transcriptions and /v1/audio/translations."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from typing import Any, Literal
from uuid import uuid4

from fastapi import Response

from deployments.core.calls import SamplingParams, TranscribeCall
from deployments.core.errors import BadRequest
from deployments.core.events import Finished, Usage
from deployments.core.logprobs import TokenLogprob
from deployments.core.model_card import ModelCard
from deployments.core.transcript import Segment, TranscriptionStarted, TranscriptSegment, Word
from deployments.openai.fields.logprobs import finite
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import Chunks, json_answer, sse, sse_answer, text_answer, to_json
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

Task = Literal["transcribe", "translate"]


async def create_transcription(exchange: Exchange) -> Response:
    """Write down what is said in a recording, at once or as a stream."""
    body, card = await exchange.read_form(TranscriptionBody, LISTS)
    if body.timestamp_granularities and body.response_format != "verbose_json":
        raise BadRequest(
            f"Invalid 'timestamp_granularities': it needs response_format verbose_json; got {body.response_format}.",
            param="timestamp_granularities",
        )
    if body.include and body.response_format != "json":
        raise BadRequest(
            f"Invalid 'include': logprobs need response_format json; got {body.response_format}.", param="include"
        )
    return await _respond(exchange, body, card, "transcribe")


async def create_translation(exchange: Exchange) -> Response:
    """Put what is said in a recording into English text."""
    body, card = await exchange.read_form(TranslationBody, LISTS)
    return await _respond(exchange, body, card, "translate")


async def _respond(exchange: Exchange, body: TranslationBody, card: ModelCard, task: Task) -> Response:
    transcript = Transcript(exchange, body, card, task)
    if body.stream:
        return await sse_answer(exchange, transcript.chunks())
    if body.response_format in ("json", "verbose_json"):
        return await json_answer(exchange, transcript.answer())
    kind = "text/vtt" if body.response_format == "vtt" else "text/plain"
    return await text_answer(exchange, transcript.answer(), kind)


class Transcript:
    """One transcription under way.

    Attributes:
        call: what the model is asked.
    """

    def __init__(self, exchange: Exchange, body: TranslationBody, card: ModelCard, task: Task) -> None:
        wanted = body.timestamp_granularities if isinstance(body, TranscriptionBody) else []
        self._exchange = exchange
        self._format = body.response_format
        self._with_segments = "segment" in wanted or not wanted
        self._with_words = "word" in wanted
        self._with_logprobs = isinstance(body, TranscriptionBody) and "logprobs" in body.include
        self._heard = TranscriptionStarted(language="", duration=0.0)
        self._usage = Usage(prompt_tokens=0)
        self._text = Trimmed()
        self._shown: list[str] = []
        self._segments: list[Segment] = []
        self._words: list[Word] = []
        self._logprobs: list[TokenLogprob] = []
        self.call = TranscribeCall(
            request_id=f"trsc-{uuid4().hex}",
            model=card.id,
            audio=body.file,
            task=task,
            language=body.language,
            prompt=body.prompt,
            segments=self._format in ("srt", "vtt") or (self._format == "verbose_json" and self._with_segments),
            words=self._with_words,
            logprobs=self._with_logprobs,
            sampling=_sampling(body),
            max_seconds=exchange.options.max_audio_seconds,
            max_samples=exchange.options.media_max_samples,
            stream=body.stream,
        )

    async def answer(self) -> bytes:
        """The whole answer in the format that was asked for."""
        async with aclosing(self.chunks()) as chunks:
            async for _ in chunks:
                pass
        if self._format not in ("json", "verbose_json"):
            return self._whole().encode()
        usage: DurationUsage = {"type": "duration", "seconds": round(self._heard.duration, 3)}
        answer: Transcription = {"text": self._text.whole, "usage": usage}
        if self._with_logprobs:
            answer["logprobs"] = _entries(self._logprobs)
        if self._format == "verbose_json":
            answer.update(self._details())
        return to_json(answer)

    async def chunks(self) -> Chunks:
        """The events of a stream."""
        if self._format == "vtt":
            yield self._show(VTT_HEAD)
        async with aclosing(self._exchange.generate(self.call)) as events:
            async for event in events:
                match event:
                    case TranscriptionStarted():
                        self._heard = event
                    case TranscriptSegment():
                        if gained := self._add(event):
                            yield self._show(gained, event.logprobs)
                    case Finished():
                        self._usage = event.usage
        yield sse(self._done())

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
        if self._with_logprobs:
            event["logprobs"] = _entries(logprobs)
        return sse(event)

    def _done(self) -> dict[str, Any]:
        event: dict[str, Any] = {
            "type": "transcript.text.done",
            "text": self._whole(),
            "usage": _tokens(self._usage),
        }
        if self._with_logprobs:
            event["logprobs"] = _entries(self._logprobs)
        if self._format == "verbose_json":
            event.update(self._details())
        return event

    def _whole(self) -> str:
        return "".join(self._shown)

    def _details(self) -> Any:
        """What verbose_json has beside the text."""
        details: dict[str, Any] = {
            "task": self.call.task,
            "language": "english" if self.call.task == "translate" else self._heard.language,
            "duration": round(self._heard.duration, 3),
        }
        if self._with_segments:
            details["segments"] = [_segment(number, segment) for number, segment in enumerate(self._segments)]
        if self._with_words:
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


def _sampling(body: TranslationBody) -> SamplingParams:
    return SamplingParams(
        max_tokens=body.max_completion_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
    )


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
