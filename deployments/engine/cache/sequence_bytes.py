"""The memory of a sequence of the cache."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass

from deployments.engine.cache.cache import AnyCache, BatchCache, EncoderBatchCache
from deployments.engine.cache.layers import KeyValueLayer, StateLayer, column_room


@dataclass(frozen=True, slots=True)
class SequenceBytes:
    """Bytes of a sequence, measured on a cache that a forward has filled.

    Attributes:
        columns: the bytes of one column of all layers that keep equally many columns, and how many (None: all).
        states: bytes of the states, whatever the sequence's length.
        encoded: bytes of one column of the encoder's keys and values.
    """

    columns: tuple[tuple[int, int | None], ...]
    states: int
    encoded: int = 0

    @classmethod
    def from_cache(cls, cache: AnyCache) -> SequenceBytes:
        """Measured on a cache with one sequence."""
        if isinstance(cache, EncoderBatchCache):
            own, cross = cls.from_cache(cache.self_attention_cache), cls.from_cache(cache.cross_attention_cache)
            return cls(own.columns, own.states, sum(size for size, _ in cross.columns))
        assert isinstance(cache, BatchCache)
        attention = [layer for layer in cache.layers if isinstance(layer, KeyValueLayer) and layer.is_initialized]
        sizes: Counter[int | None] = Counter()
        for layer in attention:
            sizes[layer.keep] += layer.column_bytes
        columns = tuple((size, keep) for keep, size in sizes.items())
        states = sum(layer.state_bytes for layer in cache.layers if isinstance(layer, StateLayer))
        return cls(columns, states)

    def of_sequence(self, width: int, encoded: int = 0) -> int:
        """Bytes of a sequence in buffers for `width` tokens, and `encoded` tokens of an encoder."""
        columns = sum(size * column_room(width if keep is None else min(width, keep)) for size, keep in self.columns)
        return columns + self.states + (self.encoded * column_room(encoded) if encoded else 0)

    def longest(self, budget: int, limit: int) -> int:
        """Tokens of the longest sequence that a budget of bytes holds, at most `limit`."""
        return bisect.bisect_right(range(1, limit + 1), budget, key=self.of_sequence)

    def read(self, width: int) -> int:
        """Bytes that a decode step reads for a sequence of a batch of this width."""
        return sum(size * (width if keep is None else min(width, keep)) for size, keep in self.columns)
