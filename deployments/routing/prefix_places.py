"""Which replicas were sent prompts with a beginning, so that their prefix caches have it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Place = TypeVar("Place", bound=Hashable)


class PrefixPlaces(Generic[Place]):
    """The places of beginnings, of which the least recently used are forgotten first.

    It is a guess: what a replica has dropped is not known here. A place is forgotten some time after the last prompt,
    and when its replica is gone.

    Args:
        limit: number of beginnings to remember.
        lifetime_s: seconds after which a place is forgotten.
    """

    def __init__(self, limit: int = 16384, lifetime_s: float = 600.0) -> None:
        self._limit = limit
        self._lifetime_s = lifetime_s
        self._places: OrderedDict[str, dict[Place, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def longest(self, blocks: Sequence[str]) -> list[Place]:
        """The places of the longest beginning that is known, the first one first.

        Args:
            blocks: digests of the beginnings of a prompt, the shortest first.
        """
        oldest = time.monotonic() - self._lifetime_s
        for block in reversed(blocks):
            if found := [place for place, used in self._places.get(block, {}).items() if used >= oldest]:
                return found
        return []

    def note(self, blocks: Iterable[str], place: Place) -> None:
        """A prompt with these beginnings was sent to a place."""
        now = time.monotonic()
        for block in blocks:
            self._places.setdefault(block, {})[place] = now
            self._places.move_to_end(block)
        while len(self._places) > self._limit:
            self._places.popitem(last=False)

    def keep_only(self, places: set[Place]) -> None:
        """Forget all other places."""
        for block, known in list(self._places.items()):
            for place in known.keys() - places:
                del known[place]
            if not known:
                del self._places[block]
