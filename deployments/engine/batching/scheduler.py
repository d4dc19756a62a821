"""Which rows wait, which prompts are computed and which rows decode together, as far as rows and bytes go."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from deployments.engine.batching.prefill import Prefill, Prefiller, Source
from deployments.engine.batching.prefix_cache import PrefixStore
from deployments.engine.batching.prefix_reuse import Reuse
from deployments.engine.batching.running_batches import Batches, Limits
from deployments.engine.batching.sequence import Batch, Row
from deployments.engine.cache.row_bytes import RowBytes

_RECOVERY_STEPS = 64


class Scheduler:
    """Decides, and keeps what it has decided; computes nothing.

    Args:
        prefiller: tells which prompts one forward can compute.
        reuse: finds the beginnings of prompts.
        store: prefixes of finished rows, which give way to what runs.
        row_bytes: what a row costs.
        limits: what the rows may use.

    Attributes:
        waiting: rows that nothing is computed for, the next one first.
        prefills: prompts being computed, the oldest first.
        batches: rows that decode.
        max_rows: rows computed together, fewer than the limit for a while after memory ran out.
    """

    def __init__(
        self, prefiller: Prefiller, reuse: Reuse, store: PrefixStore, row_bytes: RowBytes, limits: Limits
    ) -> None:
        self.limits = limits
        self.waiting: deque[Row] = deque()
        self.prefills: list[Prefill] = []
        self.batches = Batches(row_bytes, limits)
        self.max_rows = limits.max_rows
        self._prefiller = prefiller
        self._reuse = reuse
        self._store = store
        self._calm_steps = 0
        self._arrived = 0

    @property
    def rows(self) -> list[Row]:
        """Every row that has left the queue."""
        return [*self._prefilling, *self.batches.rows]

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.prefills or self.batches)

    @property
    def nothing_runs(self) -> bool:
        """Whether all memory is free, so that the first waiting row fits if it ever will."""
        return not (self.prefills or self.batches)

    @property
    def spare(self) -> int:
        """Bytes of the budget that the running rows do not need soon."""
        return self.limits.budget - self.batches.reserved - self._prefilling_need

    def add(self, row: Row) -> None:
        """Queue a row."""
        self._arrived += 1
        row.order = self._arrived
        self.waiting.append(row)

    def queue_first(self, rows: Sequence[Row]) -> None:
        """Queue rows before all others, in their order."""
        self.waiting.extendleft(reversed(rows))

    def begin_step(self) -> None:
        """Let rows pause or go on as memory asks, and kept prefixes give way to them."""
        self.batches.balance(self.limits.budget, self._prefilling)
        self._make_room()

    def end_step(self) -> None:
        """After memory ran out, dare one row more from time to time."""
        self._calm_steps += 1
        if self.max_rows < self.limits.max_rows and self._calm_steps >= _RECOVERY_STEPS:
            self.max_rows, self._calm_steps = self.max_rows + 1, 0

    def out_of_memory(self, failed: int) -> None:
        """Give up what can be computed again, and run fewer rows for a while.

        Args:
            failed: how many rows the forward had that found no memory, if they run no more.
        """
        self._store.clear()
        self.max_rows, self._calm_steps = max(1, min(self.max_rows, len(self.rows) + failed) // 2), 0

    def next_group(self) -> tuple[list[Row], list[Source | None]] | None:
        """Rows whose prompts one prefill may begin now, taken from the queue, each with the source of its beginning.

        First come first served, as far as rows and bytes go. At most two prefills are under way: a prompt of several
        chunks lets short ones pass.
        """
        if not self.waiting or len(self.prefills) >= 2 or self.batches.paused:
            return None
        if any(self._prefiller.completes(prefill) for prefill in self.prefills):
            return None
        rows, sources = self._candidates(short_only=bool(self.prefills))
        if not rows:
            return None
        sources = self._prefiller.together(rows, sources)
        rows = rows[: len(sources)]
        for row in rows:
            self.waiting.remove(row)
        self._make_room(sum(self.batches.need([row]) for row in rows))
        return rows, sources

    def next_prefill(self, step: int) -> Prefill:
        """The oldest and the shortest in turn, so that neither short nor long prompts wait for the others."""
        if step % 2:
            return self.prefills[0]
        return min(self.prefills, key=lambda prefill: prefill.remaining)

    def joinable(self) -> tuple[Batch, Batch] | None:
        """Two batches that had better be one, the larger first."""
        return self.batches.joinable(self.limits.budget - self._prefilling_need)

    def _candidates(self, *, short_only: bool) -> tuple[list[Row], list[Source | None]]:
        """Waiting rows that may begin now, as many as one forward computes."""
        rows: list[Row] = []
        sources: list[Source | None] = []
        spare = self.spare
        places = self.max_rows - len(self.rows)
        tokens = 0
        for row in self.waiting:
            spare -= self.batches.need([row])
            enough = spare >= 0 and self.batches.safe(self.limits.budget, [*self._prefilling, *rows, row])
            lacking = not enough and (rows or not self.nothing_runs)
            if lacking or len(rows) >= places or tokens >= self._prefiller.group:
                break
            source = self._reuse.source(row, self.batches)
            to_go = len(row.ids) - (0 if source is None else source.length)
            if self._reuse.soon_served(row, source, [*self._prefilling, *rows]) or (
                short_only and to_go > self._prefiller.chunk
            ):
                spare += self.batches.need([row])
                continue
            tokens += to_go
            rows.append(row)
            sources.append(source)
        return rows, sources

    @property
    def _prefilling(self) -> list[Row]:
        return [row for prefill in self.prefills for row in prefill.rows]

    @property
    def _prefilling_need(self) -> int:
        return sum(self.batches.need([row]) for row in self._prefilling)

    def _make_room(self, more: int = 0) -> None:
        """Let kept prefixes give way to what the rows need soon, and to so many bytes more."""
        if len(self._store):
            self._store.shrink(self.spare - more)
