"""How many bytes rows take, and how many there are."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from deployments.engine.base.cgroup import free_bytes
from deployments.engine.cache.cache import AnyRowsCache, EncoderRowsCache, RowsCache
from deployments.engine.cache.layers import KeyValueRows, StateRows, column_room

_CPU_SHARE, _DEVICE_SHARE = 0.5, 0.85


@dataclass(frozen=True, slots=True)
class RowBytes:
    """What a row costs, measured on a cache that a forward has filled.

    Attributes:
        columns: the bytes of one column of all layers that keep equally many columns, and how many (None: all).
        states: bytes of the states, whatever the row's length.
        encoded: bytes of one column of the encoder's keys and values.
    """

    columns: tuple[tuple[int, int | None], ...]
    states: int
    encoded: int = 0

    @classmethod
    def of(cls, cache: AnyRowsCache) -> RowBytes:
        """Measured on a cache with one row."""
        if isinstance(cache, EncoderRowsCache):
            own, cross = cls.of(cache.self_attention_cache), cls.of(cache.cross_attention_cache)
            return cls(own.columns, own.states, sum(size for size, _ in cross.columns))
        assert isinstance(cache, RowsCache)
        attention = [layer for layer in cache.layers if isinstance(layer, KeyValueRows) and layer.is_initialized]
        sizes: Counter[int | None] = Counter()
        for layer in attention:
            sizes[layer.keep] += layer.column_bytes
        columns = tuple((size, keep) for keep, size in sizes.items())
        states = sum(layer.state_bytes for layer in cache.layers if isinstance(layer, StateRows))
        return cls(columns, states)

    def of_row(self, width: int, encoded: int = 0) -> int:
        """Bytes of a row in buffers for `width` tokens, and `encoded` tokens of an encoder."""
        columns = sum(size * column_room(width if keep is None else min(width, keep)) for size, keep in self.columns)
        return columns + self.states + (self.encoded * column_room(encoded) if encoded else 0)

    def longest(self, budget: int, limit: int) -> int:
        """Tokens of the longest row that a budget of bytes holds, at most `limit`."""
        return bisect.bisect_right(range(1, limit + 1), budget, key=self.of_row)

    def read(self, width: int) -> int:
        """Bytes of columns that a decode step reads for a row of a batch so wide."""
        return sum(size * (width if keep is None else min(width, keep)) for size, keep in self.columns)


def can_all_finish(budget: int, rows: Iterable[tuple[int, int]]) -> bool:
    """Whether rows can end one after the other, each taking over what those before it have left.

    This is the safe state of the banker's algorithm (Dijkstra, EWD 623), for a given order.

    Args:
        budget: bytes in all.
        rows: what each row has now and needs in the end, the first to end first.
    """
    rows = list(rows)
    spare = budget - sum(now for now, _ in rows)
    for now, final in rows:
        if final - now > spare:
            return False
        spare += now
    return True


def default_budget(device: torch.device) -> int:
    """Bytes for caches when the configuration names none: a share of what is free now, weights already loaded."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + spare) * _DEVICE_SHARE)
    return int(free_bytes() * _CPU_SHARE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())
