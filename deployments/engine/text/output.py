"""Turns the tokens of a choice into text and a finish reason."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.core.calls import SamplingParams
from deployments.core.events import Delta, FinishReason
from deployments.core.logprobs import TokenLogprob
from deployments.core.reasoning import ReasoningMarkers
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.sampling.sample import Sampled
from deployments.engine.text.stop_strings import StopStrings as StopStrings
from deployments.engine.text.vocabulary import Vocabulary


class ChoiceOutput:
    """Turns the tokens of one choice into deltas, and knows when it has ended.

    A terminator is a token of the choice but not part of its text, unless `include_stop_str_in_output`. In the model's
    reasoning no stop string counts: hosted APIs apply them to the answer, and a thought often repeats the question.

    Args:
        reasoning: how the model marks its reasoning.
        opened: the prompt has opened it.
        prompt: the token ids that the text goes on from.

    Attributes:
        finished: the last delta, with a finish_reason, has been returned.
        cached_tokens: prompt tokens whose computation was reused; reported with the first delta.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        params: SamplingParams,
        *,
        reasoning: ReasoningMarkers | None = None,
        opened: bool = False,
        prompt: Sequence[int] = (),
    ) -> None:
        self.finished = False
        self.cached_tokens = 0
        self._vocabulary = vocabulary
        self._params = params
        self._detokenizer = vocabulary.detokenizer(
            skip_special_tokens=params.skip_special_tokens, markers=params.markers, prompt=prompt
        )
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._eos_ids = frozenset() if params.ignore_eos else vocabulary.eos_ids
        self._stop_ids = frozenset(params.stop_token_ids)
        contents = vocabulary.special_contents
        self._stop_specials = {contents[stop]: stop for stop in params.stop if stop in contents}
        self._reasoning = ReasoningText(reasoning, opened=opened) if reasoning is not None else None
        self._reasoned = self._undecided = 0
        self._count = 0
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    @classmethod
    def from_request(
        cls, vocabulary: Vocabulary, request: EngineRequest, *, encoder_decoder: bool = False
    ) -> ChoiceOutput:
        """The output of a request; an encoder's prompt is nothing that a text goes on from."""
        return cls(
            vocabulary,
            request.sampling,
            reasoning=request.reasoning,
            opened=request.reasoning_opened,
            prompt=request.input_ids if request.continues and not encoder_decoder else (),
        )

    def push(self, sampled: Sampled) -> Delta | None:
        """Add a token.

        Returns:
            What can be given out now; None while all of it is held back. Only a delta with a finish_reason is last.
        """
        token_id = sampled.token_id
        self._count += 1
        self._tokens.append(token_id)
        if self._params.logprobs is not None and sampled.score is not None:
            self._logprobs.append(self._vocabulary.scored(token_id, sampled.score))
        may_end = self._count >= self._params.min_tokens
        if may_end and (token_id in self._eos_ids or token_id in self._stop_ids or token_id in self._stop_specials):
            return self._terminate(token_id, sampled.ends or "stop")
        text, stop = self._feed(self._detokenizer.push(token_id), may_end)
        if stop is not None:
            return self._delta(text, "stop", stop)
        if sampled.ends is not None:
            return self._finish(text, sampled.ends)
        if self._params.max_tokens is not None and self._count >= self._params.max_tokens:
            return self._finish(text, "length")
        return self._delta(text) if text or self._logprobs else None

    def finish(self, reason: FinishReason) -> Delta:
        """End the choice here, with all that was held back."""
        return self._finish("", reason)

    def _terminate(self, token_id: int, reason: FinishReason) -> Delta:
        text = ""
        if self._params.include_stop_str_in_output:
            text, _ = self._feed(self._detokenizer.push(token_id), False)
        stop_reason: str | int | None = self._stop_specials.get(token_id)
        if stop_reason is None and token_id in self._stop_ids:
            stop_reason = token_id
        return self._finish(text, reason, stop_reason)

    def _finish(self, text: str, reason: FinishReason, stop_reason: str | int | None = None) -> Delta:
        """The last delta; text that was held back may still complete a stop string."""
        may_end = stop_reason is None and self._count >= self._params.min_tokens
        more, stop = self._feed(self._detokenizer.finish(), may_end, last=True)
        if stop is not None:
            return self._delta(text + more, "stop", stop)
        return self._delta(text + more + self._stops.flush(), reason, stop_reason)

    def _feed(self, text: str, may_end: bool, *, last: bool = False) -> tuple[str, str | None]:
        """Text that can be given out, and the stop string that ended it."""
        if self._reasoning is None:
            return self._stops.feed(text, may_end)
        if self._reasoning.inside and not last:
            self._undecided += 1
        thought, answer = self._reasoning.split(text, last=last)
        if self._reasoning.begun:
            self._reasoned += self._undecided
            self._undecided = 0
        text, stop = self._stops.feed(answer, may_end)
        return thought + text, stop

    def _delta(self, text: str, reason: FinishReason | None = None, stop_reason: str | int | None = None) -> Delta:
        delta = Delta(
            text=text,
            token_ids=tuple(self._tokens),
            logprobs=tuple(self._logprobs) if self._params.logprobs is not None else None,
            finish_reason=reason,
            stop_reason=stop_reason,
            cached_tokens=self.cached_tokens,
            reasoning_tokens=self._reasoned,
        )
        self.finished = reason is not None
        self.cached_tokens = self._reasoned = 0
        self._tokens.clear()
        self._logprobs.clear()
        return delta


class ReasoningText:
    """Separates the reasoning of a text from the answer after it.

    Attributes:
        inside: the next token belongs to the reasoning, or may.
        begun: there is reasoning.
    """

    def __init__(self, markers: ReasoningMarkers, *, opened: bool) -> None:
        self.inside = True
        self._markers = markers
        self.begun = opened
        self._held = ""
        # The newlines after it are its end: readers drop them.
        self._ending = False

    def split(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """What is reasoning, markers included, and what is answer; only what may be either is held back.

        Args:
            last: nothing follows.
        """
        if self._ending:
            answer = text.lstrip("\n")
            self._ending = not answer
            return text[: len(text) - len(answer)], answer
        if not self.inside:
            return "", text
        text, self._held = self._held + text, ""
        if not self.begun:
            begun = text.lstrip()
            if not begun.startswith(self._markers.opening):
                if self._markers.opening.startswith(begun) and not last:
                    self._held = text
                    return "", ""
                self.inside = False
                return "", text
            self.begun = True
        found = text.find(self._markers.closing)
        if found >= 0:
            self.inside, end = False, found + len(self._markers.closing)
            answer = text[end:].lstrip("\n")
            self._ending = not answer
            return text[: len(text) - len(answer)], answer
        size = 0 if last else held_back(text, self._markers.closing)
        self._held = text[len(text) - size :]
        return text[: len(text) - size], ""


def held_back(text: str, marker: str) -> int:
    """How many characters at the end of `text` could be the beginning of a marker."""
    sizes = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((size for size in sizes if marker.startswith(text[-size:])), 0)
