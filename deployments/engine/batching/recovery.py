"""What happens to sequences after a forward failed or found no memory.

They are computed again, each by itself, so that one that breaks every forward fails alone. After memory ran out fewer
sequences run together, and the number rises again one by one.
"""

from __future__ import annotations

from collections import abc

from deployments.core.errors import ModelError
from deployments.engine.base.failures import as_error, free_memory, is_out_of_memory, raise_if_lost
from deployments.engine.batching.prefix_cache import PrefixStore
from deployments.engine.batching.scheduler import Scheduler
from deployments.engine.batching.sequence import Batch, Sequence
from deployments.engine.model.forward import Forward

_MAX_ATTEMPTS = 3
_CALM_STEPS = 64
"""Steps after which the batch size is raised by one."""


class Recovery:
    """Recovery of the sequences of one step loop. After an error that the GPU does not survive there is none:
    `DeviceLost` is raised.

    Args:
        forward: the model's forward passes.
        scheduler: has the sequences; its `max_batch_size` is lowered and raised here.
        store: kept prefixes, dropped if memory runs out.
    """

    def __init__(self, forward: Forward, scheduler: Scheduler, store: PrefixStore) -> None:
        self._forward = forward
        self._scheduler = scheduler
        self._store = store
        self._calm_steps = 0

    def after_step(self, error: Exception) -> None:
        """After a step that raised, when the caches may be wrong: compute each sequence again by itself, or give up."""
        raise_if_lost(error)
        scheduler = self._scheduler
        sequences = sorted((s for s in scheduler.sequences if s.active), key=lambda s: s.order)
        for sequence in sequences:
            scheduler.waiting.discard(sequence)
        scheduler.prefills.clear()
        scheduler.batches.clear()
        if not sequences:
            for sequence in scheduler.waiting:
                sequence.fail(ModelError(f"The engine failed: {type(error).__name__}: {error}"))
            scheduler.waiting.clear()
        for sequence in sequences:
            if sequence.attempts > _MAX_ATTEMPTS:
                sequence.fail(as_error(error))
        self.isolate([sequence for sequence in sequences if sequence.active], error)

    def after_decode(self, batch: Batch, error: Exception) -> None:
        """After a decode forward that raised: put its sequences where the guilty one, if there is one, fails alone."""
        raise_if_lost(error)
        self._scheduler.batches.remove(batch)
        if len(batch.sequences) == 1 or batch.cache.has_states or is_out_of_memory(error):
            self.after_forward(batch.sequences, error)
            return
        batch.cache.rewind()
        try:
            singles = [Batch(batch.cache.copy_sequence(i), [sequence]) for i, sequence in enumerate(batch.sequences)]
        except Exception as failure:
            self.after_forward(batch.sequences, failure)
            return
        for sequence, single in zip(batch.sequences, singles, strict=True):
            sequence.isolated = True
            self._scheduler.batches.add(single)

    def after_forward(self, sequences: abc.Sequence[Sequence], error: Exception) -> None:
        """After a forward that raised and left no usable cache: compute its sequences again, isolated, or give up."""
        raise_if_lost(error)
        memory = is_out_of_memory(error)
        others_run = len(sequences) > 1 or not self._scheduler.nothing_runs
        if len(sequences) == 1 and not (memory and others_run and sequences[0].attempts < _MAX_ATTEMPTS):
            self._free_memory(sequences, error)
            sequences[0].fail(as_error(error, alone=True))
            return
        self.isolate(sequences, error)

    def isolate(self, sequences: abc.Sequence[Sequence], error: Exception) -> None:
        """Compute sequences again, each by itself."""
        raise_if_lost(error)
        self._free_memory(sequences, error)
        for sequence in sequences:
            sequence.attempts += 1
            sequence.isolated = True
            sequence.live.running = False
        self.compute_again(sequences)

    def compute_again(self, sequences: abc.Sequence[Sequence]) -> None:
        """Queue sequences before all others, to be computed from their first token."""
        if self._forward.recomputes:
            for sequence in sequences:
                sequence.frequencies = self._forward.rotary.frequencies(len(sequence.ids))
        self._scheduler.queue_first(sequences)

    def decoded(self, sequences: abc.Sequence[Sequence]) -> None:
        """After a decode forward that did not fail: its sequences may join others again."""
        for sequence in sequences:
            sequence.isolated, sequence.attempts = False, 0

    def end_step(self) -> None:
        """After an out-of-memory error, raise the batch size by one every 64 steps."""
        scheduler = self._scheduler
        self._calm_steps += 1
        if scheduler.max_batch_size < scheduler.limits.max_batch_size and self._calm_steps >= _CALM_STEPS:
            scheduler.max_batch_size, self._calm_steps = scheduler.max_batch_size + 1, 0

    def _free_memory(self, sequences: abc.Sequence[Sequence], error: Exception) -> None:
        """If sequences found no memory: free what can be computed again, and halve the batch size."""
        if not is_out_of_memory(error):
            return
        self._store.clear()
        scheduler, self._calm_steps = self._scheduler, 0
        running = len(scheduler.sequences) + len(sequences)
        scheduler.max_batch_size = max(1, min(scheduler.max_batch_size, running) // 2)
        free_memory()
