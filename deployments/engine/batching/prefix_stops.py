"""Where the computation of a prompt stops for a moment, so that its cache up to there is kept."""

from __future__ import annotations

from collections.abc import Iterable

from deployments.engine.batching.sequence import Sequence, common_prefix
from deployments.engine.cache.cache import AnyCache, BatchCache

_WORTH_STOPPING = 64
_LONGEST_TAIL = 32


class PrefixStops:
    """Lengths at which the caches of prompts are kept. Only for caches that cannot be cut to a beginning afterwards:
    states, and windows that have slid on.

    There are two kinds of them. A prompt stops where others part from it: examples that many questions follow. And it
    stops before its tail: tokens that open the answer, such as `<think>`, and that the next prompt of the conversation
    does not have.

    Args:
        cache: an empty cache of the model.
    """

    def __init__(self, cache: AnyCache) -> None:
        self._cache = cache if isinstance(cache, BatchCache) else None
        self._tail: list[int] = []

    def find(self, sequence: Sequence, saved: int, kept: Iterable[list[int]]) -> tuple[int, ...]:
        """The stops of a prompt, in their order.

        Args:
            saved: how many of its tokens need not be computed.
            kept: token ids of prefixes whose content key is the same.
        """
        ids = sequence.ids
        if not self._stops(sequence):
            return ()
        alike = 0
        for other in kept:
            common = min(common_prefix(other, ids), len(ids) - 1) if other[:1] == ids[:1] else 0
            if common > alike:
                alike = common
                self._learn(other[common:], ids)
        stops = {alike, len(ids) - len(self._tail) if _ends_with(ids, self._tail) else 0}
        return tuple(sorted(stop for stop in stops if stop - saved >= _WORTH_STOPPING))

    def serves(self, sequence: Sequence, common: int, computed: int) -> bool:
        """Whether others will be able to begin with the first `common` tokens of a sequence; it then stops there.

        Args:
            computed: how many of its tokens are in its cache already.
        """
        if not self._stops(sequence) or common == len(sequence.ids) or common in sequence.stops:
            return True
        if computed >= common:
            return False
        sequence.stops = tuple(sorted({*sequence.stops, common}))
        return True

    def _stops(self, sequence: Sequence) -> bool:
        plain = not sequence.request.model_inputs and sequence.inspected is None
        return self._cache is not None and plain and not self._cache.can_cut(len(sequence.ids), 1)

    def _learn(self, rest: list[int], ids: list[int]) -> None:
        """Note the tail: what another prompt has after the common beginning, if this one ends with it too."""
        if 0 < len(rest) <= _LONGEST_TAIL and _ends_with(ids, rest):
            self._tail = rest


def before_tail(sequence: Sequence) -> bool:
    """Whether a sequence has stopped so near its prompt's end that this is not worth keeping too."""
    return bool(sequence.stops) and sequence.prompt_length - sequence.stops[-1] <= _LONGEST_TAIL


def _ends_with(ids: list[int], tail: list[int]) -> bool:
    return bool(tail) and ids[-len(tail) :] == tail
