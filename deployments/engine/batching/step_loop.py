"""Continuous batching: one step advances a prefill by a chunk and every running row by a token.

All of it runs in one thread and knows nothing of threads. A row is waiting, then being prefilled, then in a batch,
and leaves by finishing, failing or being cancelled, at any of these. The scheduler says whose turn it is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from deployments.core.errors import ModelError, TroupeError
from deployments.core.events import Delta, EngineEvent, Failed
from deployments.engine.base.failures import as_error, is_out_of_memory
from deployments.engine.base.protocol import EngineStats
from deployments.engine.batching.prefill import Prefill, Prefiller, Source
from deployments.engine.batching.prefix_cache import PrefixStore
from deployments.engine.batching.prefix_reuse import Reuse
from deployments.engine.batching.prompt_lookup import PromptLookup
from deployments.engine.batching.running_batches import Limits
from deployments.engine.batching.scheduler import Scheduler
from deployments.engine.batching.sequence import Batch, Row
from deployments.engine.cache.row_bytes import RowBytes
from deployments.engine.model.forward import Decode, Forward
from deployments.engine.sampling.sample import Sampled, sample_rows

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3

Group = TypeVar("Group", Batch, Prefill)


class StepLoop:
    """The rows of one model.

    Args:
        forward: the model's forward passes.
        prefiller: computes prompts.
        store: prefixes of finished rows.
        row_bytes: what a row costs.
        limits: what the rows may use.
        decode: computes a decode step in the place of `forward.decode`.
        lookup: guesses tokens.
    """

    def __init__(
        self,
        forward: Forward,
        prefiller: Prefiller,
        store: PrefixStore,
        row_bytes: RowBytes,
        limits: Limits,
        decode: Decode | None = None,
        lookup: PromptLookup | None = None,
    ) -> None:
        self.forward = forward
        self.decode: Decode = forward.decode if decode is None else decode
        self.lookup = lookup
        self.prefiller = prefiller
        self.store = store
        self.limits = limits
        self.reuse = Reuse(forward, store, row_bytes, limits.border)
        self.scheduler = Scheduler(prefiller, self.reuse, store, row_bytes, limits)
        self.batches = self.scheduler.batches
        self._counts: Counter[str] = Counter()

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def add(self, row: Row) -> None:
        """Queue a row."""
        self.scheduler.add(row)

    def cancel(self, request_id: str) -> None:
        """Forget a row, wherever it is."""
        for row in [row for row in self.scheduler.waiting if row.request.request_id == request_id]:
            self.scheduler.waiting.remove(row)
        for row in [row for row in self.scheduler.rows if row.request.request_id == request_id]:
            self._leave(row)

    def fail_waiting(self, error: TroupeError) -> None:
        """End the rows that nothing has been computed for."""
        for row in self.scheduler.waiting:
            self._emit(row, Failed(error))
        self.scheduler.waiting.clear()

    def fail_all(self, error: TroupeError) -> None:
        """End every row with an error."""
        self.fail_waiting(error)
        for row in self.scheduler.rows:
            self._emit(row, Failed(error))
        self.scheduler.prefills.clear()
        self.batches.clear()

    def step(self) -> None:
        """Advance one prefill by one forward, and every batch by one token."""
        for row, error in self.scheduler.begin_step():
            self._recover_rows([row], error)
        while (group := self.scheduler.next_group()) is not None:
            self._begin(*group)
        if self.scheduler.prefills:
            self._advance(self.scheduler.next_prefill(self._counts["steps"]))
        if self.forward.recomputes:
            self._begin_anew()
        self._regroup()
        for batch in self.batches:
            self._decode(batch)
        self.scheduler.end_step()
        self._counts["steps"] += 1

    def stats(self) -> EngineStats:
        """Counters of this moment."""
        prefills, batches = self.scheduler.prefills, self.batches.all
        caches = [*(prefill.cache for prefill in prefills), *(batch.cache for batch in batches)]
        return EngineStats(
            kind="continuous_batching",
            rows=len(self.scheduler.rows),
            waiting=len(self.scheduler.waiting),
            prefix_entries=len(self.store),
            cache_bytes=sum(cache.nbytes for cache in caches),
            prefix_bytes=self.store.nbytes,
            budget_bytes=self.limits.budget,
            **self._counts,
        )

    # Prefill.

    def _begin(self, rows: list[Row], sources: list[Source | None]) -> None:
        try:
            prefill = self.prefiller.begin(rows, sources)
        except Exception as error:
            self._recover_rows(rows, error)
            return
        self.scheduler.prefills.append(prefill)
        if prefill.logits is not None:
            self._advance(prefill)

    def _advance(self, prefill: Prefill) -> None:
        try:
            logits = self.prefiller.advance(prefill)
        except Exception as error:
            self.scheduler.prefills.remove(prefill)
            self._recover_rows(prefill.rows, error)
            return
        if logits is None:
            return
        self.scheduler.prefills.remove(prefill)
        batch = Batch(prefill.cache, prefill.rows)
        self.batches.add(batch)
        for row in batch.rows:
            self._count_prompt(row)
        self._keep_prompts(batch, logits)
        if any(row.ended for row in batch.rows):
            logits = self._without_ended(batch, logits)
        if len(logits):
            self._sample(batch, logits[:, None])

    def _count_prompt(self, row: Row) -> None:
        if len(row.ids) == row.prompt_length:
            self._counts["prompt_tokens"] += row.prompt_length
            self._counts["cached_tokens"] += row.output.cached_tokens
        if row.scorer is None:
            return
        try:
            self._emit(row, row.scorer.scores())
        except Exception as error:
            self._emit(row, Failed(as_error(error)))
        row.scorer = None

    def _without_ended(self, batch: Batch, logits: Tensor) -> Tensor:
        """Let rows leave that have failed already; the logits [rows, vocab] of the others."""
        rows = list(batch.rows)
        for row in rows:
            if row.ended:
                self._leave(row)
        return logits[[rows.index(row) for row in batch.rows if not row.ended]]

    def _keep_prompts(self, batch: Batch, logits: Tensor) -> None:
        """Keep prompts that no crop of the finished rows could bring back."""
        for index, row in enumerate(batch.rows):
            if not batch.cache.holds(index, 1) and row.output.cached_tokens < row.prompt_length:
                self._keep(batch, index, logits[index])

    # Decode.

    def _decode(self, batch: Batch) -> None:
        guesses = None if self.lookup is None else self.lookup.guesses(batch)
        try:
            if self.lookup is None or guesses is None:
                logits = self.decode(
                    [row.ids[-1] for row in batch.rows], [row.offset for row in batch.rows], batch.cache
                )[:, None]
            else:
                logits = self.lookup.forward(batch, guesses)
        except Exception as error:
            self._recover(batch, error)
            return
        for row in batch.rows:
            row.alone, row.attempts = False, 0
        self._sample(batch, logits, guesses)

    def _sample(self, batch: Batch, logits: Tensor, guesses: Sequence[Sequence[int]] | None = None) -> None:
        """Choose every row's next token and those after guesses that were right; let finished rows leave.

        Args:
            logits: [rows, 1 + guesses, vocab].
            guesses: the tokens behind each row's last one, if there were any in the forward.
        """
        rows = list(batch.rows)
        active, right, leaving = list(range(len(rows))), [0] * len(rows), {}
        for place in range(logits.shape[1]):
            here = logits[:, place] if len(active) == len(rows) else logits[active, place]
            going_on = []
            for i, sampled in zip(active, self._sampled([rows[i] for i in active], here), strict=True):
                if (how := self._take(rows[i], sampled)) is not None:
                    leaving[i] = how
                elif guesses is not None and guesses[i][place : place + 1] == [sampled.token_id]:
                    going_on.append(i)
            active = going_on
            for i in active:
                right[i] += 1
            if not active:
                break
        if self.lookup is not None and guesses is not None:
            self.lookup.settle(batch, guesses, right)
        for i, how in leaving.items():
            self._leave(rows[i], **how)

    def _take(self, row: Row, sampled: Sampled) -> dict[str, bool] | None:
        """Give a token to the row; how it leaves, if it does."""
        if sampled.error is not None:
            self._emit(row, Failed(sampled.error))
            return {"blank": True}
        if row.request.sampling.max_tokens == 0:
            self._emit(row, row.output.finish("length"))
            return {"keep": True}
        self._counts["generated_tokens"] += 1
        row.ids.append(sampled.token_id)
        return None if self._push(row, sampled) else {"keep": True}

    def _sampled(self, rows: Sequence[Row], logits: Tensor) -> list[Sampled]:
        samplers = [row.sampler for row in rows]
        one_by_one = self.limits.border is not None and len(rows) > 1 and not all(s.plain for s in samplers)
        try:
            if not one_by_one:
                return sample_rows(logits, samplers)
        except Exception as error:
            if len(rows) == 1:
                return [Sampled(-1, error=as_error(error))]
        return [self._sampled([row], logits[i : i + 1])[0] for i, row in enumerate(rows)]

    def _push(self, row: Row, sampled: Sampled) -> bool:
        """Give a token to the row's client; False if it was the last."""
        try:
            delta = row.output.push(sampled)
        except Exception as error:
            self._emit(row, Failed(as_error(error)))
            return False
        if delta is not None:
            self._emit(row, delta)
        return not row.output.finished

    def _emit(self, row: Row, event: EngineEvent) -> None:
        row.ended = isinstance(event, Failed) or (isinstance(event, Delta) and event.finish_reason is not None)
        try:
            row.emit(event)
        except Exception:
            logger.exception("An event of request %s could not be delivered.", row.request.request_id)

    def _regroup(self) -> None:
        """Join batches where that saves work."""
        while (pair := self.scheduler.joinable()) is not None:
            into, other = pair
            self.batches.remove(other)
            try:
                into.absorb(other)
            except Exception as error:
                self.batches.remove(into)
                self._recover_rows([*into.rows, *other.rows], error)

    def _begin_anew(self) -> None:
        """Queue the rows whose next token gives all of their keys other frequencies: `generate` computes them anew."""
        rows = self.batches.rows
        for row in [row for row in rows if row.frequencies != self.forward.rotary.frequencies(len(row.ids))]:
            self._leave(row)
            self._queue_first([row])

    def _queue_first(self, rows: Sequence[Row]) -> None:
        """Let rows be computed, or computed again, before all others."""
        if self.forward.recomputes:
            for row in rows:
                row.frequencies = self.forward.rotary.frequencies(len(row.ids))
        self.scheduler.queue_first(rows)

    # Leaving.

    def _leave(self, row: Row, *, keep: bool = False, blank: bool = False) -> None:
        """Remove a row that runs.

        Args:
            keep: put its cache into the prefix store.
            blank: its cache may hold values that are not finite.
        """
        for prefill in self.scheduler.prefills:
            if row in prefill.rows:
                self._drop(row, prefill, self.scheduler.prefills.remove)
                return
        batch = self.batches.of(row)
        if batch is None:
            return
        if keep:
            self._keep(batch, batch.rows.index(row))
        self._drop(row, batch, self.batches.remove, blank=blank)

    def _drop(self, row: Row, group: Group, remove: Callable[[Group], None], *, blank: bool = False) -> None:
        """Take a row out of a batch or a prefill.

        Args:
            remove: takes the whole of it away.
        """
        others = [other for other in group.rows if other is not row]
        if not others:
            remove(group)
            return
        try:
            group.drop(row, blank=blank)
        except Exception as error:
            remove(group)
            self._compute_again([other for other in others if not other.ended], error)

    def _keep(self, batch: Batch, index: int, logits: Tensor | None = None) -> None:
        self.reuse.keep(batch, index, self.scheduler.spare, logits)

    # Failures.

    def recover(self, error: Exception) -> None:
        """After a step that raised, when the caches may be wrong: compute the rows again, each alone, or give up."""
        rows = sorted((row for row in self.scheduler.rows if not row.ended), key=lambda row: row.order)
        self.scheduler.prefills.clear()
        self.batches.clear()
        if not rows:
            self.fail_waiting(ModelError(f"The engine failed: {type(error).__name__}: {error}"))
        for row in rows:
            if row.attempts > _MAX_ATTEMPTS:
                self._emit(row, Failed(as_error(error)))
        self._compute_again([row for row in rows if not row.ended], error)

    def _recover(self, batch: Batch, error: Exception) -> None:
        """After a decode forward that raised: put its rows where the guilty one, if there is one, fails alone."""
        self.batches.remove(batch)
        if len(batch.rows) == 1 or batch.cache.has_states or is_out_of_memory(error):
            self._recover_rows(batch.rows, error)
            return
        batch.cache.rewind()
        try:
            alone = [Batch(batch.cache.copy_row(index), [row]) for index, row in enumerate(batch.rows)]
        except Exception as failure:
            self._recover_rows(batch.rows, failure)
            return
        for row, single in zip(batch.rows, alone, strict=True):
            row.alone = True
            self.batches.add(single)

    def _recover_rows(self, rows: Sequence[Row], error: Exception) -> None:
        """After a forward that raised and left no usable cache: compute its rows again, alone, or give up."""
        memory = is_out_of_memory(error)
        others_run = len(rows) > 1 or not self.scheduler.nothing_runs
        if len(rows) == 1 and not (memory and others_run and rows[0].attempts < _MAX_ATTEMPTS):
            self._after_out_of_memory(rows, error)
            self._emit(rows[0], Failed(as_error(error, alone=True)))
            return
        self._compute_again(rows, error)

    def _compute_again(self, rows: Sequence[Row], error: Exception) -> None:
        """Queue rows to be computed again, each alone."""
        self._after_out_of_memory(rows, error)
        for row in rows:
            row.attempts += 1
            row.alone = True
        self._queue_first(rows)

    def _after_out_of_memory(self, rows: Sequence[Row], error: Exception) -> None:
        """Free what can be freed if rows found no memory."""
        if is_out_of_memory(error):
            self.scheduler.out_of_memory(len(rows))
            if self.forward.device.type == "cuda":
                torch.cuda.empty_cache()
