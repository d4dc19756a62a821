"""The batches that decode at the same time: when two of them become one, and which rows pause for want of memory.

Rows of very different lengths in one batch make the short ones read the padding of the long one; in two batches the
weights are read twice. Both are bytes, so they are compared.

Few rows become as long as they may, so rows are let in by what they need soon. As they grow, the youngest pause, with
their caches kept, so that the oldest can always end: nothing is computed twice and no text depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deployments.engine.batching.memory import can_all_finish
from deployments.engine.batching.sequence import Batch, Row
from deployments.engine.cache.layers import row_room
from deployments.engine.cache.row_bytes import RowBytes

_AHEAD = 32
"""Tokens by which a running row is taken to be longer: its buffers grow by steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What rows may use.

    Attributes:
        max_batch_size: rows computed together.
        budget: bytes for caches, the prefix store's included.
        growth: tokens ahead for which memory is set apart.
        split_bytes: bytes that a batch may read in vain in a step before a batch of their own is worth another read
            of the weights.
        mixes_lengths: rows of different lengths may share a batch.
        joins: rows may share a batch at all.
        border: deterministic mode: prefixes are reused at multiples of so many tokens, as far as they were computed as
            a prompt, and sampling is row by row. None elsewhere.
    """

    max_batch_size: int
    budget: int
    split_bytes: int
    growth: int = 512
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
        self._paused: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        return iter(tuple(self._batches))

    def __len__(self) -> int:
        return len(self.all)

    @property
    def all(self) -> list[Batch]:
        """Those that decode and those that pause, of one row each."""
        return self._batches + self._paused

    @property
    def rows(self) -> list[Row]:
        return [row for batch in self.all for row in batch.rows]

    @property
    def paused(self) -> int:
        """How many rows pause."""
        return len(self._paused)

    @property
    def reserved(self) -> int:
        """Bytes that the batches have, or need soon."""
        running = sum(self._taken(batch) for batch in self._batches)
        return running + sum(batch.cache.nbytes for batch in self._paused)

    def need(self, rows: Sequence[Row], room: int = 1) -> int:
        """Bytes that some rows need soon in a batch with room for so many."""
        return room * self._widest(rows, [min(row.final_length, len(row.ids) + self.limits.growth) for row in rows])

    def most(self, rows: Sequence[Row], room: int = 1) -> int:
        """Bytes that some rows may come to need in a batch with room for so many."""
        return room * self._widest(rows, [row.final_length for row in rows])

    def safe(self, budget: int, others: Sequence[Row] = ()) -> bool:
        """Whether every row can end, the oldest first; `others` are rows on their way into a batch."""
        rows = sorted((*self.rows, *others), key=lambda row: row.order)
        if sum(self.most([row]) for row in rows) <= budget:
            return True
        paused = {id(batch.rows[0]) for batch in self._paused}
        ahead = ((row, 0 if id(row) in paused else _AHEAD) for row in rows)
        return can_all_finish(
            budget, ((min(self._now(row, n), self.most([row])), self.most([row])) for row, n in ahead)
        )

    def balance(self, budget: int, others: Sequence[Row]) -> list[tuple[Row, Exception]]:
        """Let the youngest rows pause where memory is short, and go on where it is not.

        Args:
            budget: bytes for the rows of batches and `others`.
            others: rows being prefilled.

        Returns:
            Rows for whose pause there is no memory, and why: they have left.
        """
        left: list[tuple[Row, Exception]] = []
        spare = budget - sum(self.need([row]) for row in others)
        if not self._paused and sum(self.most(b.rows, b.cache.room) for b in self._batches) <= spare:
            return left
        while len(self._batches) > 1 or any(len(batch.rows) > 1 for batch in self._batches):
            if self.reserved <= spare and self.safe(budget, others):
                break
            youngest = max((row for batch in self._batches for row in batch.rows), key=lambda row: row.order)
            if (error := self._pause(youngest)) is not None:
                left.append((youngest, error))
        while self._paused:
            oldest = self._paused.pop(0)
            self._batches.append(oldest)
            if len(self._batches) > 1 and not (self.reserved <= spare and self.safe(budget, others)):
                self._batches.remove(oldest)
                self._paused.insert(0, oldest)
                break
        return left

    def of(self, row: Row) -> Batch | None:
        """The batch a row is in."""
        return next((batch for batch in self.all if row in batch.rows), None)

    def add(self, batch: Batch) -> None:
        self._batches.append(batch)

    def remove(self, batch: Batch) -> None:
        (self._batches if batch in self._batches else self._paused).remove(batch)

    def clear(self) -> None:
        self._batches.clear()
        self._paused.clear()

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
        apart, rows = self._taken(a) + self._taken(b), [*a.rows, *b.rows]
        return self.reserved - apart + self.need(rows, row_room(len(rows))) <= budget

    def _pause(self, row: Row) -> Exception | None:
        """Set a row aside with its cache, which takes a copy of it; without one the row leaves."""
        batch = next(batch for batch in self._batches if row in batch.rows)
        alone: Batch | None = batch
        error: Exception | None = None
        if len(batch.rows) > 1:
            try:
                alone = Batch(batch.cache.copy_row(batch.rows.index(row)), [row])
            except Exception as failure:
                alone, error = None, failure
            batch.drop(row)
            batch.cache.compact()
        else:
            self._batches.remove(batch)
        if alone is not None:
            self._paused.append(alone)
            self._paused.sort(key=lambda paused: paused.rows[0].order)
        return error

    def _taken(self, batch: Batch) -> int:
        return max(batch.cache.nbytes, self.need(batch.rows, batch.cache.room))

    def _now(self, row: Row, ahead: int) -> int:
        return self._widest([row], [len(row.ids) + ahead])

    def _widest(self, rows: Sequence[Row], widths: Sequence[int]) -> int:
        """Bytes of one row in a batch as wide as the widest of its rows."""
        return self.row_bytes.of_row(max(widths), max(row.encoded_length for row in rows))
