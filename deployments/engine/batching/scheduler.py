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
        max_batch_size: rows computed together, fewer than the limit for a while after memory ran out.
    """

    def __init__(
        self, prefiller: Prefiller, reuse: Reuse, store: PrefixStore, row_bytes: RowBytes, limits: Limits
    ) -> None:
        self.limits = limits
        self.waiting: deque[Row] = deque()
        self.prefills: list[Prefill] = []
        self.batches = Batches(row_bytes, limits)
        self.max_batch_size = limits.max_batch_size
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

    def begin_step(self) -> list[tuple[Row, Exception]]:
        """Let rows pause or go on as memory asks, and kept prefixes give way to them.

        Returns:
            Rows that could not pause and have left their batches.
        """
        left = self.batches.balance(self.limits.budget, self._prefilling)
        self._make_room()
        return left

    def end_step(self) -> None:
        """After memory ran out, dare one row more from time to time."""
        self._calm_steps += 1
        if self.max_batch_size < self.limits.max_batch_size and self._calm_steps >= _RECOVERY_STEPS:
            self.max_batch_size, self._calm_steps = self.max_batch_size + 1, 0

    def out_of_memory(self, failed: int) -> None:
        """Give up what can be computed again, and run fewer rows for a while.

        Args:
            failed: how many rows the forward had that found no memory, if they run no more.
        """
        self._store.clear()
        self.max_batch_size, self._calm_steps = max(1, min(self.max_batch_size, len(self.rows) + failed) // 2), 0

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
        prefilling = self._prefilling
        places, spare = self.max_batch_size - len(self.rows), self.spare
        tokens = 0
        for row in self.waiting:
            if len(rows) >= places or tokens >= self._prefiller.group:
                break
            if self._passed_over(row, prefilling, short_only):
                continue
            need = self.batches.need([row])
            enough = spare >= need and self.batches.safe(self.limits.budget, [*prefilling, *rows, row])
            if not enough and (rows or not self.nothing_runs):
                break
            source = self._reuse.source(row, self.batches)
            to_go = len(row.ids) - (0 if source is None else source.length)
            row.to_go = (to_go, self._store.version)
            row.awaits = self._reuse.soon_served(row, source, [*prefilling, *rows])
            if row.awaits is not None or (short_only and to_go > self._prefiller.chunk):
                continue
            spare -= need
            tokens += to_go
            rows.append(row)
            sources.append(source)
            if source is not None and source.logits is not None:
                break  # Nothing is to be computed with it.
        return rows, sources

    def _passed_over(self, row: Row, prefilling: Sequence[Row], short_only: bool) -> bool:
        """Whether a row was found to wait, for reasons that still hold: a prompt is not matched in every step."""
        if any(row.awaits is other for other in prefilling):
            return True
        if not short_only or row.to_go is None:
            return False
        to_go, version = row.to_go
        return version == self._store.version and to_go > self._prefiller.chunk

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
