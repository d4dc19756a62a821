"""A choice on its way out: tokens in, text and finish reason out."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.engine.sampling import Sampled
from deployments.engine.vocabulary import Vocabulary
from deployments.messages import Delta, FinishReason, SamplingParams, TokenLogprob


class ChoiceOutput:
    """Turns the tokens of one choice into deltas, and knows when it has ended.

    A terminator is a token of the choice but not part of its text, unless `include_stop_str_in_output`.

    Attributes:
        finished: the last delta, with a finish_reason, has been returned.
        cached_tokens: prompt tokens whose computation was reused; reported with the first delta.
    """

    def __init__(self, vocabulary: Vocabulary, params: SamplingParams) -> None:
        self.finished = False
        self.cached_tokens = 0
        self._vocabulary = vocabulary
        self._params = params
        self._detokenizer = vocabulary.detokenizer(skip_special_tokens=params.skip_special_tokens)
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._eos_ids = frozenset() if params.ignore_eos else vocabulary.eos_ids
        self._stop_ids = frozenset(params.stop_token_ids)
        contents = vocabulary.special_contents
        self._stop_specials = {contents[stop]: stop for stop in params.stop if stop in contents}
        self._count = 0
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

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
        if may_end and self._terminates(token_id):
            return self._terminate(token_id, sampled.ends or "stop")
        text, stop = self._stops.feed(self._detokenizer.push(token_id), may_end)
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

    def _terminates(self, token_id: int) -> bool:
        return token_id in self._eos_ids or token_id in self._stop_ids or token_id in self._stop_specials

    def _terminate(self, token_id: int, reason: FinishReason) -> Delta:
        text = ""
        if self._params.include_stop_str_in_output:
            text, _ = self._stops.feed(self._detokenizer.push(token_id), False)
        stop_reason: str | int | None = self._stop_specials.get(token_id)
        if stop_reason is None and token_id in self._stop_ids:
            stop_reason = token_id
        return self._finish(text, reason, stop_reason)

    def _finish(self, text: str, reason: FinishReason, stop_reason: str | int | None = None) -> Delta:
        """The last delta; text that was held back may still complete a stop string."""
        may_end = stop_reason is None and self._count >= self._params.min_tokens
        more, stop = self._stops.feed(self._detokenizer.finish(), may_end)
        if stop is not None:
            return self._delta(text + more, "stop", stop)
        return self._delta(text + more + self._stops.flush(), reason, stop_reason)

    def _delta(self, text: str, reason: FinishReason | None = None, stop_reason: str | int | None = None) -> Delta:
        delta = Delta(
            text=text,
            token_ids=tuple(self._tokens),
            logprobs=tuple(self._logprobs) if self._params.logprobs is not None else None,
            finish_reason=reason,
            stop_reason=stop_reason,
            cached_tokens=self.cached_tokens,
        )
        self.finished = reason is not None
        self.cached_tokens = 0
        self._tokens.clear()
        self._logprobs.clear()
        return delta


class StopStrings:
    """Finds stop strings in a text that arrives in pieces, and holds back what may become one.

    Args:
        stops: the strings; empty ones are ignored.
        include: the string found is part of the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include = include
        self._held = ""

    def feed(self, text: str, may_end: bool) -> tuple[str, str | None]:
        """Add text.

        Args:
            may_end: whether a stop string that ends in `text` counts.

        Returns:
            The text to give out, and the stop string that ended it, the one whose end comes first.
        """
        if not self._stops:
            return text, None
        known, text = len(self._held), self._held + text
        if may_end and (found := self._find(text, known)):
            start, stop = found
            self._held = ""
            return text[: start + len(stop) if self._include else start], stop
        safe = self._safe(text)
        self._held = text[safe:]
        return text[:safe], None

    def flush(self) -> str:
        """The text held back."""
        text, self._held = self._held, ""
        return text

    def _find(self, text: str, known: int) -> tuple[int, str] | None:
        """Start and string of the match that ends first, among those that end after `known`."""
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                found = (start + len(stop), start, stop)
        return None if found is None else (found[1], found[2])

    def _safe(self, text: str) -> int:
        """How much of the text no stop string can begin in any more."""
        safe = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < safe:
                if stop.startswith(text[start:]):
                    safe = start
                start = text.find(stop[0], start + 1)
        return safe
