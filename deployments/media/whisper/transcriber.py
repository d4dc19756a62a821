"""Recordings to text: a Whisper's windows, one after another, decoded in the rows of its engine.

A recording that fits in a window and needs no times is decoded at once, and its text given as it comes. Any other is
read window by window with times; each window begins where the last complete segment ended, so a segment is given once
it is certain.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from deployments.core.calls import SamplingParams, TranscribeCall
from deployments.core.errors import UnsupportedParameter
from deployments.core.events import Event, Finished, Usage
from deployments.core.logprobs import Candidate, TokenLogprob
from deployments.core.transcript import Segment, TranscriptionStarted, TranscriptSegment, Word
from deployments.engine.base.protocol import Engine, EngineRequest
from deployments.engine.base.running_requests import Interval
from deployments.media.audio import decode_audio
from deployments.media.whisper.answer import WindowAnswer
from deployments.media.whisper.format import FRAMES_PER_SECOND, Span, WhisperFormat, language_name
from deployments.media.whisper.word_times import WordAligner

T = TypeVar("T")
Run = Callable[[Callable[[], T]], Awaitable[T]]

_PARAM = "file"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    """A recording and how it is read.

    Attributes:
        features: its spectrogram, of which `frames` are sound.
        times: it is read window by window with times, and not at once.
        prompt: of every window.
        written_in: the language code of the text.
    """

    started: TranscriptionStarted
    features: torch.Tensor
    frames: int
    times: bool
    prompt: list[int]
    written_in: str


class Transcriber:
    """One transcription under way.

    Args:
        call: the request.
        form: how the model writes.
        engine: of the model.
        aligner: finds the times of words, where the checkpoint has what that needs.
        encode: runs a function in the thread that encodes; `align`, in the one that computes beside the engine.
        terminators: the ids that end a text.
        interval: gives the seconds between two pieces of a stream, the first excepted.
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
        interval: Interval,
        device: torch.device,
    ) -> None:
        self._call = call
        self._format = form
        self._engine = engine
        self._aligner = aligner
        self._encode = encode
        self._align = align
        self._terminators = terminators
        self._interval = interval if call.stream else None
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
        recording = await self._recording()
        yield recording.started
        if recording.times:
            seek = 0
            while seek < recording.frames and self._room(recording.prompt) > 0:
                segment, moved = await self._next_window(recording, seek)
                yield segment
                seek += moved
        else:
            self._audio_tokens += -(-recording.frames // 2)
            window, written = self._format.window(recording.features, 0), ""
            with closing(await self._decoding(window, recording.prompt, times=False)) as answer:
                while not answer.complete:
                    await answer.more()
                    if (piece := self._piece(answer, written)) is not None:
                        written += piece.text
                        yield piece
            self._count(answer)
        yield Finished(
            usage=Usage(
                prompt_tokens=self._prompt_tokens + self._audio_tokens,
                completion_tokens=self._completion_tokens,
                audio_tokens=self._audio_tokens,
            )
        )

    async def _recording(self) -> _Recording:
        """The recording decoded, and the prompt that its windows have in common."""
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
        times = call.segments or call.words or frames > form.frames
        return _Recording(
            started=TranscriptionStarted(language=language_name(code), duration=len(samples) / form.rate),
            features=features,
            frames=frames,
            times=times,
            prompt=form.prompt(language, call.task, times=times, before=before),
            written_in="en" if call.task == "translate" else code,
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
        with closing(self._answer(window, self._format.opening(), sampling, ())) as answer:
            await answer.all()
        return answer.logprobs[0].top

    def _piece(self, answer: WindowAnswer, written: str) -> TranscriptSegment | None:
        """What a window's text gained since `written`; None if there is nothing to send yet."""
        last = answer.complete
        if not (last or self._call.stream):
            return None
        text = self._format.text(self._words(answer))
        if not last:
            # The last character may be unfinished.
            text = text.rstrip("\ufffd")
        gained = text[len(written) :] if text.startswith(written) else ""
        if not gained and not (last and self._call.logprobs):
            return None
        return TranscriptSegment(text=gained, logprobs=self._logprobs(answer, self._words(answer)) if last else ())

    async def _next_window(self, recording: _Recording, seek: int) -> tuple[TranscriptSegment, int]:
        """What the window at `seek` adds, and how many frames the next one comes later."""
        heard = min(self._format.frames, recording.frames - seek)
        self._audio_tokens += -(-heard // 2)
        window = self._format.window(recording.features, seek)
        with closing(await self._decoding(window, recording.prompt, times=True)) as answer:
            await answer.all()
        self._count(answer)
        no_speech = await self._no_speech(window, answer) if self._call.segments else 0.0
        token_ids = self._words(answer)
        spans, moved = self._format.spans(token_ids, heard)
        words: list[Word] = []
        if self._call.words and (aligner := self._aligner) is not None:
            align = partial(aligner.words, window, heard, answer.prompt, token_ids, spans)
            words = [word for each in await self._align(partial(align, language=recording.written_in)) for word in each]
        return self._segment(answer, spans, words, seek=seek, no_speech=no_speech), moved

    def _segment(
        self, answer: WindowAnswer, spans: Sequence[Span], words: Sequence[Word], *, seek: int, no_speech: float
    ) -> TranscriptSegment:
        """What a window adds to the text; `words` have their times within the window."""
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
                no_speech_prob=no_speech,
            )
            for span, text in zip(spans, texts, strict=True)
            if text.strip()
        )
        kept = self._words(answer)[: sum(len(span.token_ids) for span in spans)]
        return TranscriptSegment(
            text=whole,
            segments=segments if self._call.segments else (),
            words=tuple(
                replace(word, start=round(began + word.start, 2), end=round(began + word.end, 2)) for word in words
            ),
            logprobs=self._logprobs(answer, kept),
        )

    async def _decoding(self, window: torch.Tensor, prompt: list[int], *, times: bool) -> WindowAnswer:
        """The answer to a window, begun."""
        sampling = replace(
            self._call.sampling,
            max_tokens=self._room(prompt),
            logprobs=0,
            processed_logprobs=True,
            prompt_logprobs=0 if times and self._scores_prompts else None,
            logprob_token_ids=(self._format.no_speech,),
        )
        rules = await self._encode(lambda: self._format.processors(prompt, self._device, times=times))
        return self._answer(window, prompt, sampling, rules)

    def _answer(
        self, window: torch.Tensor, prompt: list[int], sampling: SamplingParams, rules: Sequence[Any]
    ) -> WindowAnswer:
        request_id = f"{self._call.request_id}#{self._requests}"
        self._requests += 1
        request = EngineRequest(
            request_id=request_id,
            input_ids=prompt,
            sampling=sampling,
            model_inputs={"input_features": window},
            content_key=request_id,
            processors=rules,
            turn=self._call.turn,
        )
        return WindowAnswer(self._engine, request, interval=self._interval)

    def _count(self, answer: WindowAnswer) -> None:
        self._completion_tokens += len(answer.token_ids)
        self._prompt_tokens += len(answer.prompt)

    def _room(self, prompt: Sequence[int]) -> int:
        """How many tokens may still be written."""
        room, asked = self._format.limit - len(prompt), self._call.sampling.max_tokens
        return room if asked is None else min(room, asked - self._completion_tokens)

    @property
    def _scores_prompts(self) -> bool:
        return "prompt_logprobs" in self._engine.supports

    async def _no_speech(self, window: torch.Tensor, answer: WindowAnswer) -> float:
        """How likely the model finds it that nobody speaks in a window: after the opening, in place of a language."""
        place = self._format.after_opening(answer.prompt)
        if place is None or not self._scores_prompts:
            (silence,) = await self._after_opening(window, (self._format.no_speech,))
            return math.exp(silence.logprob)
        entry = None if answer.scores is None else answer.scores.scores[place]
        return math.exp(entry.top[0].logprob) if entry is not None and entry.top else 0.0

    def _words(self, answer: WindowAnswer) -> list[int]:
        """The tokens before the end of the text."""
        ids = answer.token_ids
        return ids[:-1] if ids and ids[-1] in self._terminators else ids

    def _logprobs(self, answer: WindowAnswer, token_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
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
