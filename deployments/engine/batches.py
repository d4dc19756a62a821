"""The batches that decode at the same time, and when two of them become one.

Rows of very different lengths in one batch make the short ones read the padding of the long one; in two batches the
weights are read twice. Both are bytes, so they are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deployments.engine.memory import RowBytes
from deployments.engine.rows import Batch, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What rows may use.

    Attributes:
        max_rows: rows computed together.
        budget: bytes for caches, the prefix store's included.
        split_bytes: bytes that a batch may read in vain in a step before a batch of their own is worth another read
            of the weights.
        mixes_lengths: rows of different lengths may share a batch.
        joins: rows may share a batch at all.
        border: deterministic mode: prefixes are reused at multiples of so many tokens, as far as they were computed as
            a prompt, and sampling is row by row. None elsewhere.
    """

    max_rows: int
    budget: int
    split_bytes: int
    mixes_lengths: bool = True
    joins: bool = True
    border: int | None = None


class Batches:
    """The running batches.

    Args:
        row_bytes: what rows cost.
        limits: what they may use.
    """

    def __init__(self, row_bytes: RowBytes, limits: Limits) -> None:
        self.row_bytes = row_bytes
        self.limits = limits
        self._batches: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        return iter(tuple(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self._batches for row in batch.rows]

    @property
    def reserved(self) -> int:
        """Bytes that the batches may come to need."""
        return sum(self.need(batch.rows) for batch in self._batches)

    def need(self, rows: Sequence[Row]) -> int:
        """Bytes that some rows may come to need in one batch."""
        encoded = max(row.encoded_length for row in rows)
        return self.row_bytes.of_rows(len(rows), max(row.final_length for row in rows), encoded)

    def of(self, row: Row) -> Batch:
        """The batch a row is in."""
        return next(batch for batch in self._batches if row in batch.rows)

    def add(self, batch: Batch) -> None:
        self._batches.append(batch)

    def remove(self, batch: Batch) -> None:
        self._batches.remove(batch)

    def clear(self) -> None:
        self._batches.clear()

    def joinable(self, budget: int) -> tuple[Batch, Batch] | None:
        """Two batches, the larger one first, that save reading if they join and fit into a budget of bytes."""
        for i, batch in enumerate(self._batches):
            for other in self._batches[:i]:
                if self._worth_joining(batch, other) and self._fits(batch, other, budget):
                    return (other, batch) if len(other.rows) >= len(batch.rows) else (batch, other)
        return None

    def _worth_joining(self, a: Batch, b: Batch) -> bool:
        rows = [*a.rows, *b.rows]
        if not self.limits.joins or any(row.alone for row in rows) or len({len(row.offset) for row in rows}) > 1:
            return False
        if not self.limits.mixes_lengths and len({*a.cache.lengths, *b.cache.lengths}) > 1:
            return False
        read, width = self.row_bytes.read, max(a.cache.width, b.cache.width)
        padding = sum(len(batch.rows) * (read(width) - read(batch.cache.width)) for batch in (a, b))
        return padding <= self.limits.split_bytes

    def _fits(self, a: Batch, b: Batch, budget: int) -> bool:
        apart = self.need(a.rows) + self.need(b.rows)
        return self.reserved - apart + self.need([*a.rows, *b.rows]) <= budget
