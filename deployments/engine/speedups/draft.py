"""Where the last few tokens of a sequence came before."""

from __future__ import annotations

from collections.abc import Sequence

_MATCH = 3
_CREDIT = 6
_PAUSE = 32


class Drafter:
    """Drafts the next tokens of one sequence, as long as it is mostly right."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._indexed = _MATCH
        self._credit = _CREDIT
        self._pauses_until = 0

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens: what came after the last occurrence of the last three.

        Args:
            ids: all tokens of the sequence; it only ever grows.
        """
        for end in range(self._indexed, len(ids)):
            self._places[tuple(ids[end - _MATCH : end])] = end
        self._indexed = max(self._indexed, len(ids))
        if len(ids) < self._pauses_until:
            return []
        place = self._places.get(tuple(ids[-_MATCH:]))
        return [] if place is None else list(ids[place : place + count])

    def learn(self, right: int, length: int) -> None:
        """After a forward: how many draft tokens were right, and how many tokens the sequence has now."""
        self._credit = min(self._credit + right - 1, _CREDIT)
        if self._credit <= 0:
            self._credit, self._pauses_until = 1, length + _PAUSE
