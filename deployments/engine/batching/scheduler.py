"""Which sequences wait, which prompts are computed and which sequences decode together."""

from __future__ import annotations

from collections import abc, deque

from deployments.engine.batching.prefill import Prefill, Prefiller, PrefixMatch
from deployments.engine.batching.prefix_cache import PrefixStore
from deployments.engine.batching.prefix_reuse import PrefixReuse
from deployments.engine.batching.running_batches import Limits, RunningBatches
from deployments.engine.batching.sequence import Batch, Sequence
from deployments.engine.cache.sequence_bytes import SequenceBytes


class Scheduler:
    """Decides, and keeps what it has decided; computes nothing.

    Args:
        prefiller: says which prompts one forward can compute.
        reuse: finds the beginnings of prompts.
        store: prefixes of finished sequences, dropped if what runs needs their memory.
        sequence_bytes: what a sequence costs.
        limits: what the sequences may use.

    Attributes:
        waiting: sequences that nothing is computed for, the next one first.
        prefills: prompts being computed, the oldest first.
        batches: sequences that decode.
        max_batch_size: sequences computed together; `Recovery` makes them fewer for a while after memory ran out.
    """

    def __init__(
        self,
        prefiller: Prefiller,
        reuse: PrefixReuse,
        store: PrefixStore,
        sequence_bytes: SequenceBytes,
        limits: Limits,
    ) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.prefills: list[Prefill] = []
        self.batches = RunningBatches(sequence_bytes, limits)
        self.max_batch_size = limits.max_batch_size
        self._prefiller = prefiller
        self._reuse = reuse
        self._store = store
        self._arrived = 0

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence that has left the queue."""
        return [*self._prefilling, *self.batches.sequences]

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.prefills or self.batches)

    @property
    def nothing_runs(self) -> bool:
        """Whether all memory is free, so that the first waiting sequence fits if it ever will."""
        return not (self.prefills or self.batches)

    @property
    def spare(self) -> int:
        """Bytes of the budget that the running sequences do not need soon."""
        return self.limits.budget - self.batches.reserved - self._prefilling_need

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._arrived += 1
        sequence.order = self._arrived
        self.waiting.append(sequence)

    def queue_first(self, sequences: abc.Sequence[Sequence]) -> None:
        """Queue sequences before all others, in their order."""
        self.waiting.extendleft(reversed(sequences))

    def begin_step(self) -> list[tuple[Sequence, Exception]]:
        """Let sequences pause or go on as memory asks, and drop kept prefixes for them.

        Returns:
            Sequences that could not pause and have left their batches.
        """
        left = self.batches.balance(self.limits.budget, self._prefilling)
        self._make_room()
        return left

    def next_group(self) -> tuple[list[Sequence], list[PrefixMatch | None]] | None:
        """Sequences whose prompts one prefill may begin now, taken from the queue, each with its beginning.

        First come, first served, within the limits of batch size and bytes. At most two prefills run at a time: a
        prompt of several chunks lets short ones pass.
        """
        if not self.waiting or len(self.prefills) >= 2 or self.batches.paused:
            return None
        if any(self._prefiller.completes(prefill) for prefill in self.prefills):
            return None
        sequences, sources = self._candidates(short_only=bool(self.prefills))
        if not sequences:
            return None
        sources = self._prefiller.together(sequences, sources)
        sequences = sequences[: len(sources)]
        for sequence in sequences:
            self.waiting.remove(sequence)
        self._make_room(sum(self.batches.bytes_soon([sequence]) for sequence in sequences))
        return sequences, sources

    def next_prefill(self, step: int) -> Prefill:
        """The oldest and the shortest in turn, so that neither short nor long prompts wait for the others."""
        if step % 2:
            return self.prefills[0]
        return min(self.prefills, key=lambda prefill: prefill.remaining)

    def joinable(self) -> tuple[Batch, Batch] | None:
        """Two batches that had better be one, the larger first."""
        return self.batches.joinable(self.limits.budget - self._prefilling_need)

    def _candidates(self, *, short_only: bool) -> tuple[list[Sequence], list[PrefixMatch | None]]:
        """Waiting sequences that may begin now, as many as one forward computes."""
        sequences: list[Sequence] = []
        sources: list[PrefixMatch | None] = []
        prefilling = self._prefilling
        places, spare = self.max_batch_size - len(self.sequences), self.spare
        tokens = 0
        for sequence in self.waiting:
            if len(sequences) >= places or tokens >= self._prefiller.group:
                break
            if self._passed_over(sequence, prefilling, short_only):
                continue
            need = self.batches.bytes_soon([sequence])
            enough = spare >= need and self.batches.all_can_finish(
                self.limits.budget, [*prefilling, *sequences, sequence]
            )
            if not enough and (sequences or not self.nothing_runs):
                break
            source = self._reuse.source(sequence, self.batches)
            to_go = len(sequence.ids) - (0 if source is None else source.length)
            sequence.to_go = (to_go, self._store.version)
            sequence.awaits = self._reuse.soon_served(sequence, source, [*prefilling, *sequences])
            if sequence.awaits is not None or (short_only and to_go > self._prefiller.chunk):
                continue
            spare -= need
            tokens += to_go
            sequences.append(sequence)
            sources.append(source)
            if source is not None and source.logits is not None:
                break  # Nothing is to be computed with it.
        return sequences, sources

    def _passed_over(self, sequence: Sequence, prefilling: abc.Sequence[Sequence], short_only: bool) -> bool:
        """Whether a sequence was found to wait, for reasons that still hold: a prompt is not matched in every step."""
        if any(sequence.awaits is other for other in prefilling):
            return True
        if not short_only or sequence.to_go is None:
            return False
        to_go, version = sequence.to_go
        return version == self._store.version and to_go > self._prefiller.chunk

    @property
    def _prefilling(self) -> list[Sequence]:
        return [sequence for prefill in self.prefills for sequence in prefill.sequences]

    @property
    def _prefilling_need(self) -> int:
        return sum(self.batches.bytes_soon([sequence]) for sequence in self._prefilling)

    def _make_room(self, more: int = 0) -> None:
        """Drop kept prefixes until there is memory for what the sequences need soon and for `more` bytes."""
        if len(self._store):
            self._store.shrink(self.spare - more)
