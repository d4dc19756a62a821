"""Converts the arrays of the server's responses to deltas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from deployments.core.calls import SamplingParams
from deployments.core.events import Delta, FinishReason
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.sampling.logprobs import TokenScore
from deployments.engine.sampling.sample import Sampled
from deployments.engine.text.output import ReasoningText, StopStrings
from deployments.engine.text.text_request import TextRequest
from model_loaders.backends.triton.words import Words

Arrays = Mapping[str, npt.NDArray[Any]]


class TokenAnswer:
    """Responses with token ids.

    Args:
        text: makes events of the tokens.
        accumulated: each response repeats what came before it.
        scored: log-probabilities were asked for.
    """

    def __init__(self, text: TextRequest, *, accumulated: bool, scored: bool) -> None:
        self._text = text
        self._prompt = text.request.input_ids
        self._accumulated = accumulated
        self._scored = scored
        self._count = 0

    def take(self, outputs: Arrays) -> None:
        """Give out what is new in a response."""
        tokens = self._new(outputs)
        logprobs = self._logprobs(outputs, len(tokens))
        self._count += len(tokens)
        for token_id, logprob in zip(tokens, logprobs, strict=True):
            self._text.take(Sampled(token_id, None if logprob is None else TokenScore(logprob, 0)))

    def finish(self, length: int) -> None:
        """The server has ended the text: at one of its limits where it has all tokens, else at an end token."""
        self._text.finish("length" if self._count >= length else "stop")

    def _new(self, outputs: Arrays) -> list[int]:
        found = outputs.get("output_ids")
        if found is None:
            return []
        row = [int(token_id) for token_id in found.reshape(-1, found.shape[-1])[0]]
        lengths = outputs.get("sequence_length")
        tokens = row if lengths is None else row[: int(lengths.reshape(-1)[0])]
        if self._count == 0 and len(tokens) > len(self._prompt) and tokens[: len(self._prompt)] == self._prompt:
            tokens = tokens[len(self._prompt) :]
        return tokens[self._count :] if self._accumulated else tokens

    def _logprobs(self, outputs: Arrays, new: int) -> list[float | None]:
        found = outputs.get("output_log_probs")
        if not self._scored or found is None:
            return [None] * new
        row: list[float | None] = [float(each) for each in found.reshape(-1, found.shape[-1])[0]]
        total = self._count + new
        return row[total - new : total] if len(row) >= total else row[len(row) - new :]


class TextAnswer:
    """Responses with text: stop strings are cut off, tokens are counted at the end."""

    def __init__(self, live: LiveRequest, params: SamplingParams, words: Words, *, accumulated: bool) -> None:
        self._live = live
        request = live.request
        markers = request.reasoning
        self._reasoning = None if markers is None else ReasoningText(markers, opened=request.reasoning_opened)
        self._words = words
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._prompt = request.prompt_text or ""
        self._accumulated = accumulated
        self._text = ""
        self._counted: int | None = None

    def take(self, outputs: Arrays) -> None:
        """Give out what is new in a response."""
        counted = outputs.get("num_output_tokens")
        if counted is not None:
            self._counted = int(counted.reshape(-1)[0])
        found = outputs.get("text_output")
        piece = "" if found is None else found.reshape(-1)[0].decode("utf-8", "replace")
        if not self._text and len(piece) > len(self._prompt) and piece.startswith(self._prompt):
            piece = piece[len(self._prompt) :]
        if self._accumulated:
            piece = piece[len(self._text) :]
        self._text += piece
        thought, piece = ("", piece) if self._reasoning is None else self._reasoning.split(piece)
        text, stop = self._stops.feed(piece, self._min_tokens == 0 or len(self._tokens()) >= self._min_tokens)
        if stop is not None:
            self._end(thought + text, "stop", stop)
        elif thought or text:
            self._live.give(Delta(text=thought + text))

    def finish(self, length: int) -> None:
        """The server has ended the text."""
        count = len(self._tokens()) if self._counted is None else self._counted
        held = "" if self._reasoning is None else "".join(self._reasoning.split("", last=True))
        self._end(held + self._stops.flush(), "length" if count >= length else "stop")

    def _tokens(self) -> list[int]:
        return self._words.ids(self._text)

    def _end(self, text: str, reason: FinishReason, stop: str | None = None) -> None:
        tokens = tuple(self._tokens())
        self._live.give(Delta(text=text, token_ids=tokens, finish_reason=reason, stop_reason=stop))
