"""Several phrases looked for at once in a text that arrives in pieces, such as stop strings and bad words.

The phrases are sorted, so that those with one beginning are neighbors. For every place where a phrase may have begun,
the range of the phrases that are still possible is kept and narrowed with every new element. A text in which no phrase
begins costs one look-up per element, however many phrases there are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

Text = TypeVar("Text", str, bytes)


class Begun(NamedTuple):
    """Phrases that may have begun at one place of the text.

    Attributes:
        low, high: their range in the sorted phrases.
        depth: elements of them that the text has; fewer than each of them has.
    """

    low: int
    high: int
    depth: int


class Phrases(Generic[Text]):
    """Strings, or byte strings, to look for; empty ones are ignored."""

    def __init__(self, phrases: Iterable[Text]) -> None:
        self.sorted: list[Text] = sorted({phrase for phrase in phrases if phrase})
        self._first: dict[Text, Begun] = {}
        for place, phrase in enumerate(self.sorted):
            known = self._first.get(phrase[:1])
            self._first[phrase[:1]] = Begun(place if known is None else known.low, place + 1, 1)

    def step(self, begun: list[Begun], element: Text) -> tuple[list[Begun], Text | None]:
        """Add one element to the text.

        Args:
            begun: what the last step has returned, or nothing at the beginning of a text.

        Returns:
            The phrases that the end of the text may be the beginning of, the longest beginning first; and the longest
            phrase that ends here.
        """
        left: list[Begun] = []
        ended: Text | None = None
        first = self._first.get(element)
        going_on: list[Begun] = [found for each in begun if (found := self._narrowed(each, element)) is not None]
        for each in going_on if first is None else [*going_on, first]:
            low = each.low
            if len(self.sorted[low]) == each.depth:
                ended = self.sorted[low] if ended is None else ended
                low += 1
            if low < each.high:
                left.append(Begun(low, each.high, each.depth))
        return left, ended

    def _narrowed(self, begun: Begun, element: Text) -> Begun | None:
        low, high, depth = begun

        def at(phrase: Text) -> Text:
            return phrase[depth : depth + 1]

        first, last = at(self.sorted[low]), at(self.sorted[high - 1])
        if first == last:
            return Begun(low, high, depth + 1) if first == element else None
        low = bisect_left(self.sorted, element, low, high, key=at)
        high = bisect_right(self.sorted, element, low, high, key=at)
        return Begun(low, high, depth + 1) if low < high else None
