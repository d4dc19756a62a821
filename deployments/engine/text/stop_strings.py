"""Strings that end a text."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.engine.base.phrase_search import Begun, Phrases


class StopStrings:
    """Finds stop strings in a text that arrives in pieces, and holds back what may become one.

    Args:
        stops: the strings; empty ones are ignored.
        include: the string found is part of the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = Phrases(stops) if any(stops) else None
        self._include = include
        self._held = ""
        self._begun: list[Begun] = []

    def feed(self, text: str, may_end: bool) -> tuple[str, str | None]:
        """Add text.

        Args:
            may_end: whether a stop string that ends in `text` counts.

        Returns:
            The text to give out, and the stop string that ended it, the one whose end comes first; of several that end
            in one place, the longest.
        """
        if self._stops is None:
            return text, None
        known, text = len(self._held), self._held + text
        for place in range(known, len(text)):
            self._begun, stop = self._stops.step(self._begun, text[place])
            if stop is not None and may_end:
                self._held, end = "", place + 1
                return text[: end if self._include else end - len(stop)], stop
        safe = len(text) - (self._begun[0].depth if self._begun else 0)
        self._held = text[safe:]
        return text[:safe], None

    def flush(self) -> str:
        """The text held back."""
        text, self._held = self._held, ""
        return text
