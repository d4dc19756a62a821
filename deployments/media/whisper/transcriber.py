"""Recordings to text: a Whisper's windows, one after another, decoded in the rows of its engine.

A recording that fits in a window and needs no times is decoded at once, and its text given as it comes. Any other is
read window by window with times; each window begins where the last complete segment ended, so a segment is given once
it is certain.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from deployments.core.calls import SamplingParams, TranscribeCall
from deployments.core.errors import UnsupportedParameter
from deployments.core.events import Delta, Event, Failed, Finished, PromptScores, Usage
from deployments.core.logprobs import Candidate, TokenLogprob
from deployments.core.transcript import Segment, TranscriptionStarted, TranscriptSegment
from deployments.engine.base.event_queue import EventQueue
from deployments.engine.base.protocol import Engine, EngineRequest
from deployments.media.audio import decode_audio
from deployments.media.whisper.format import FRAMES_PER_SECOND, Span, WhisperFormat, language_name
from deployments.media.whisper.word_times import WordAligner

T = TypeVar("T")
Run = Callable[[Callable[[], T]], Awaitable[T]]

_PARAM = "file"
_NEVER = 3600.0


@dataclass(slots=True)
class Answer:
    """What the model wrote for one prompt."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    no_speech: float = 0.0


class Transcriber:
    """One transcription under way.

    Args:
        call: the request.
        form: how the model writes.
        engine: of the model.
        aligner: finds the times of words, where the checkpoint has what that needs.
        encode: runs a function in the thread that encodes; `align`, in the one that computes beside the engine.
        terminators: the ids that end a text.
        interval: seconds between two pieces of a stream, the first excepted.
    """

    def __init__(
        self,
        call: TranscribeCall,
        form: WhisperFormat,
        engine: Engine,
        *,
        aligner: WordAligner | None,
        encode: Run[Any],
        align: Run[Any],
        terminators: frozenset[int],
        interval: float,
        device: torch.device,
    ) -> None:
        self._call = call
        self._format = form
        self._engine = engine
        self._aligner = aligner
        self._encode = encode
        self._align = align
        self._terminators = terminators
        # What is not streamed is looked at when it is complete.
        self._interval = interval if call.stream else _NEVER
        self._device = device
        self._prompt_tokens = 0
        self._audio_tokens = 0
        self._completion_tokens = 0
        self._requests = 0

    async def events(self) -> AsyncGenerator[Event, None]:
        """`TranscriptionStarted`, `TranscriptSegment`s, `Finished`.

        Raises:
            TroupeError: the recording or something in the request cannot be used, or the model failed.
        """
        call, form = self._call, self._format
        self._check_words()
        language = form.language_id(call.language) if call.language else None
        before = await self._encode(lambda: form.context(call.prompt))
        samples = await self._encode(
            lambda: decode_audio(
                call.audio, form.rate, max_seconds=call.max_seconds, max_samples=call.max_samples, param=_PARAM
            )
        )
        features, frames = await self._encode(lambda: form.features(samples))
        if language is None and form.languages:
            language = await self._guess_language(form.window(features, 0))
        code = next((code for code, token_id in form.languages.items() if token_id == language), "en")
        yield TranscriptionStarted(language=language_name(code), duration=len(samples) / form.rate)
        times = call.segments or call.words or frames > form.frames
        prompt = form.prompt(language, call.task, times=times, before=before)
        if times:
            pieces = self._windows(features, frames, prompt, "en" if call.task == "translate" else code)
        else:
            pieces = self._at_once(form.window(features, 0), frames, prompt)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece
        yield Finished(
            usage=Usage(
                prompt_tokens=self._prompt_tokens + self._audio_tokens,
                completion_tokens=self._completion_tokens,
                audio_tokens=self._audio_tokens,
            )
        )

    def _check_words(self) -> None:
        if self._call.words and self._aligner is None:
            raise UnsupportedParameter(
                f"Model {self._call.model!r} cannot tell when words are said: its generation_config has no "
                "alignment_heads.",
                param="timestamp_granularities",
            )

    async def _guess_language(self, window: torch.Tensor) -> int:
        """The likeliest language token after the opening."""
        return (await self._after_opening(window, tuple(self._format.languages.values())))[0].token_id

    async def _after_opening(self, window: torch.Tensor, ids: tuple[int, ...]) -> Sequence[Candidate]:
        """How likely each of some tokens is after the opening, the likeliest first."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0, logprob_token_ids=ids)
        answer = Answer()
        async with aclosing(self._decode(window, self._format.opening(), sampling, answer, ())) as deltas:
            async for _ in deltas:
                pass
        return answer.logprobs[0].top

    async def _at_once(
        self, window: torch.Tensor, frames: int, prompt: list[int]
    ) -> AsyncGenerator[TranscriptSegment, None]:
        """The text of one window without times, as it comes."""
        self._audio_tokens += -(-frames // 2)
        answer, written = Answer(), ""
        async with aclosing(self._decode_window(window, prompt, answer, times=False)) as deltas:
            async for last in deltas:
                if not (last or self._call.stream):
                    continue
                text = self._format.text(self._words(answer))
                if not last:
                    # The last character may be unfinished.
                    text = text.rstrip("\ufffd")
                fresh = text[len(written) :] if text.startswith(written) else ""
                written += fresh
                if fresh or (last and self._call.logprobs):
                    yield TranscriptSegment(
                        text=fresh, logprobs=self._logprobs(answer, self._words(answer)) if last else ()
                    )

    async def _windows(
        self, features: torch.Tensor, frames: int, prompt: list[int], language: str
    ) -> AsyncGenerator[TranscriptSegment, None]:
        """The segments of all windows."""
        seek = 0
        while seek < frames and self._room(prompt) > 0:
            heard = min(self._format.frames, frames - seek)
            self._audio_tokens += -(-heard // 2)
            window, answer = self._format.window(features, seek), Answer()
            async with aclosing(self._decode_window(window, prompt, answer, times=True)) as deltas:
                async for _ in deltas:
                    pass
            if self._call.segments and (self._format.after_opening(prompt) is None or not self._scores_prompts):
                (silence,) = await self._after_opening(window, (self._format.no_speech,))
                answer.no_speech = math.exp(silence.logprob)
            token_ids = self._words(answer)
            spans, moved = self._format.spans(token_ids, heard)
            yield await self._spoken(window, heard, prompt, token_ids, spans, answer, seek, language)
            seek += moved

    async def _spoken(
        self,
        window: torch.Tensor,
        frames: int,
        prompt: list[int],
        token_ids: list[int],
        spans: list[Span],
        answer: Answer,
        seek: int,
        language: str,
    ) -> TranscriptSegment:
        """What a window adds."""
        began = seek / FRAMES_PER_SECOND
        texts = [self._format.text(span.token_ids) for span in spans]
        whole = "".join(texts)
        segments = tuple(
            Segment(
                seek=seek,
                start=round(began + span.start, 2),
                end=round(began + span.end, 2),
                text=text,
                token_ids=span.token_ids,
                temperature=self._call.sampling.temperature,
                avg_logprob=_mean([token.logprob for token in answer.logprobs]),
                compression_ratio=_compression(whole),
                no_speech_prob=answer.no_speech,
            )
            for span, text in zip(spans, texts, strict=True)
            if text.strip()
        )
        words = []
        if self._call.words and self._aligner is not None:
            aligner = self._aligner
            found = await self._align(
                lambda: aligner.words(window, frames, prompt, token_ids, spans, language=language)
            )
            words = [
                replace(word, start=round(began + word.start, 2), end=round(began + word.end, 2))
                for each in found
                for word in each
            ]
        kept = token_ids[: sum(len(span.token_ids) for span in spans)]
        return TranscriptSegment(
            text=whole,
            segments=segments if self._call.segments else (),
            words=tuple(words),
            logprobs=self._logprobs(answer, kept),
        )

    async def _decode_window(
        self, window: torch.Tensor, prompt: list[int], answer: Answer, *, times: bool
    ) -> AsyncGenerator[bool, None]:
        sampling = replace(
            self._call.sampling,
            max_tokens=self._room(prompt),
            logprobs=0,
            processed_logprobs=True,
            prompt_logprobs=0 if times and self._scores_prompts else None,
            logprob_token_ids=(self._format.no_speech,),
        )
        rules = await self._encode(lambda: self._format.processors(prompt, self._device, times=times))
        async with aclosing(self._decode(window, prompt, sampling, answer, rules)) as deltas:
            async for last in deltas:
                yield last
        self._completion_tokens += len(answer.token_ids)
        self._prompt_tokens += len(prompt)

    async def _decode(
        self, window: torch.Tensor, prompt: list[int], sampling: SamplingParams, answer: Answer, rules: Sequence[Any]
    ) -> AsyncGenerator[bool, None]:
        """Let the engine decode a window into `answer`; tells each time whether it was the last."""
        request = EngineRequest(
            request_id=f"{self._call.request_id}#{self._requests}",
            input_ids=prompt,
            sampling=sampling,
            model_inputs={"input_features": window},
            content_key=f"{self._call.request_id}#{self._requests}",
            processors=rules,
        )
        self._requests += 1
        inbox = EventQueue()
        due = 0.0 if self._call.stream else time.monotonic() + _NEVER
        self._engine.submit(request, inbox.emitter(0))
        last = False
        try:
            while not last:
                events = await inbox.take(not_before=due)
                due = time.monotonic() + self._interval
                for _, event in events:
                    match event:
                        case Failed():
                            last = True
                            raise event.error
                        case PromptScores():
                            answer.no_speech = self._no_speech(event, prompt)
                        case Delta():
                            answer.token_ids.extend(event.token_ids)
                            answer.logprobs.extend(event.logprobs or ())
                            last = event.finish_reason is not None
                yield last
        finally:
            if not last:
                self._engine.cancel(request.request_id)

    def _room(self, prompt: Sequence[int]) -> int:
        """How many tokens may still be written."""
        room, asked = self._format.limit - len(prompt), self._call.sampling.max_tokens
        return room if asked is None else min(room, asked - self._completion_tokens)

    @property
    def _scores_prompts(self) -> bool:
        return "prompt_logprobs" in self._engine.supports

    def _no_speech(self, event: PromptScores, prompt: Sequence[int]) -> float:
        """How likely the model finds it, where it is asked for the language, that nobody speaks."""
        place = self._format.after_opening(prompt)
        entry = None if place is None else event.scores[place]
        return math.exp(entry.top[0].logprob) if entry is not None and entry.top else 0.0

    def _words(self, answer: Answer) -> list[int]:
        """The tokens before the end of the text."""
        ids = answer.token_ids
        return ids[:-1] if ids and ids[-1] in self._terminators else ids

    def _logprobs(self, answer: Answer, token_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of those of the first tokens that are text."""
        if not self._call.logprobs:
            return ()
        scored = zip(token_ids, answer.logprobs, strict=False)
        return tuple(score for token_id, score in scored if self._format.words_only([token_id]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _compression(text: str) -> float:
    """How much shorter a text gets by zlib; high where it repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0
