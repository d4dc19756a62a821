"""Splitting a model's reasoning from its answer."""

from __future__ import annotations

from deployments.core.reasoning import ReasoningMarkers
from deployments.openai.parsing.parts import Part, Plain, Reasoning, Splitter, held_back

# How families mark their reasoning.
MARKERS = {
    "think": ReasoningMarkers("<think>", "</think>"),
    "mistral": ReasoningMarkers("[THINK]", "[/THINK]"),
    "thought": ReasoningMarkers("<thought>", "</thought>"),
    "reasoning": ReasoningMarkers("<reasoning>", "</reasoning>"),
    "harmony": ReasoningMarkers(
        "<|channel|>analysis<|message|>",
        "<|end|>",
        begins="<|channel|>",
        answer=("<|channel|>final", "<|message|>"),
        between="<|start|>assistant",
    ),
    "seed": ReasoningMarkers("<seed:think>", "</seed:think>"),
}


class ReasoningSplitter:
    """Reasoning at the beginning of a text, between two markers; the rest goes on to `then`.

    Args:
        opened: the prompt ends with the opening marker, so that the text begins with reasoning.
        then: splits the text after the reasoning.
    """

    def __init__(self, markers: ReasoningMarkers, *, opened: bool, then: Splitter | None = None) -> None:
        self._open, self._close = markers.opening, markers.closing
        self._then: Splitter = then or Plain()
        self._reasoning: bool | None = True if opened else None
        self._begun = False
        self._buffer = ""

    def feed(self, text: str) -> list[Part]:
        self._buffer += text
        if self._reasoning is None:
            self._decide()
        if self._reasoning:
            return self._reason()
        if self._reasoning is None:
            return []
        text, self._buffer = self._buffer, ""
        return self._then.feed(text)

    def finish(self) -> list[Part]:
        if self._reasoning:
            rest = self._buffer.rstrip()
            return [Reasoning(rest), *self._then.finish()] if rest else self._then.finish()
        return [*self._then.feed(self._buffer), *self._then.finish()]

    def _decide(self) -> None:
        """See whether the text begins with the opening marker, once enough of it is there."""
        begun = self._buffer.lstrip()
        if begun.startswith(self._open):
            self._reasoning, self._buffer = True, begun[len(self._open) :]
        elif not self._open.startswith(begun):
            self._reasoning = False

    def _reason(self) -> list[Part]:
        if not self._begun:
            self._buffer = self._buffer.lstrip("\n")
            self._begun = bool(self._buffer)
        before, marker, after = self._buffer.partition(self._close)
        if marker:
            self._reasoning, self._buffer = False, ""
            self._then = _WithoutLeadingNewlines(self._then)
            parts: list[Part] = [Reasoning(before.rstrip())] if before.strip() else []
            return parts + self._then.feed(after)
        # White space at the end may belong to the closing marker.
        size = held_back(before, (self._close,))
        kept = before[: len(before) - size].rstrip()
        self._buffer = before[len(kept) :]
        return [Reasoning(kept)] if kept else []


class _WithoutLeadingNewlines:
    """Drops the newlines that separate an answer from its reasoning."""

    def __init__(self, then: Splitter) -> None:
        self._then = then
        self._begun = False

    def feed(self, text: str) -> list[Part]:
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        return self._then.feed(text) if text else []

    def finish(self) -> list[Part]:
        return self._then.finish()
