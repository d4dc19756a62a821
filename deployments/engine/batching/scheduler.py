"""Which sequences wait, which prompts are computed and which sequences decode together."""

from __future__ import annotations

from collections import abc
from dataclasses import replace
from itertools import islice

from deployments.engine.base.turns import TurnQueue
from deployments.engine.batching.prefill import Prefill, Prefiller, PrefixMatch
from deployments.engine.batching.prefix_cache import PrefixStore
from deployments.engine.batching.prefix_reuse import PrefixReuse
from deployments.engine.batching.running_batches import Limits, RunningBatches
from deployments.engine.batching.sequence import Batch, Sequence
from deployments.engine.cache.sequence_bytes import SequenceBytes

_LATER_PREFILLS = 8
"""Of as many steps, one advances the oldest prefill, be it less urgent than others."""
_KEPT_FREE = 4
"""Sequences that are less urgent than those without a priority leave this part of the memory."""
_REMEMBERED_STEPS = 512
"""For so long after a sequence has begun, the prompts of less urgent ones are computed in short chunks."""
_BETWEEN_PREFILLS = 32
"""Meanwhile less urgent sequences begin in one of 32 steps, if others run: a prefill is the longest step."""


class Scheduler:
    """Decides, and keeps what it has decided; computes nothing.

    Args:
        prefiller: says which prompts one forward can compute.
        reuse: finds the beginnings of prompts.
        store: prefixes of finished sequences, dropped if what runs needs their memory.
        sequence_bytes: what a sequence costs.
        limits: what the sequences may use.

    Attributes:
        waiting: sequences that nothing is computed for, the next one first; those that have given up their place too.
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
        self.waiting: TurnQueue[Sequence] = TurnQueue()
        self.prefills: list[Prefill] = []
        self.batches = RunningBatches(sequence_bytes, limits)
        self.max_batch_size = limits.max_batch_size
        self._prefiller = prefiller
        self._reuse = reuse
        self._store = store
        self._left: list[tuple[Sequence, Exception]] = []
        self._urgent: tuple[int, int] | None = None
        self._steps = self._yielded = 0

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
        turn = sequence.request.turn
        sequence.order = (turn.priority, self.waiting.add(sequence, turn))

    def queue_first(self, sequences: abc.Sequence[Sequence]) -> None:
        """Queue sequences before all others, in their order."""
        self.waiting.add_first(sequences)

    def begin_step(self) -> list[tuple[Sequence, Exception]]:
        """Let sequences pause or go on as memory asks, and drop kept prefixes for them.

        Returns:
            Sequences that could not pause and have left their batches.
        """
        self._steps += 1
        left, self._left = self._left, []
        left += self.batches.balance(self.limits.budget, self._prefilling)
        self._make_room()
        return left

    def next_group(self) -> tuple[list[Sequence], list[PrefixMatch | None]] | None:
        """Sequences whose prompts one prefill may begin now, taken from the queue, each with its beginning.

        In turn, see `turns.py`, within the limits of batch size and bytes. A sequence that decodes gives up its place
        to one that is more urgent. At most two prefills run at a time: a prompt of several chunks lets short ones pass.
        """
        if not self.waiting or len(self.prefills) >= 2:
            return None
        if any(self._prefiller.completes(prefill) for prefill in self.prefills):
            return None
        sequences, sources = self._candidates()
        if len(sequences) > max(0, self._places):
            self._displace(len(sequences) - max(0, self._places), self._urgency(sequences[0]))
            sequences, sources = self._candidates()
        if not sequences:
            return None
        sources = self._prefiller.together(sequences, sources)
        sequences = sequences[: len(sources)]
        for sequence in sequences:
            self._begin(sequence)
        self._make_room(sum(self.batches.bytes_soon([sequence]) for sequence in sequences))
        return sequences, sources

    def resume(self) -> None:
        """Let sequences that have given up their places decode again, if it is their turn and there are places."""
        displaced = self.batches.displaced
        if not displaced:
            return
        next_ones = [s for s in islice(self.waiting, max(0, self._places)) if s in displaced]
        if not (next_ones or self.prefills or self.batches.places):
            next_ones = displaced[:1]
        for sequence in next_ones:
            if self.batches.resume(sequence, self.limits.budget, self._prefilling):
                self._begin(sequence)

    def next_prefill(self, step: int) -> Prefill:
        """The oldest and the shortest in turn, so that neither short nor long prompts wait for the others.

        Less urgent ones have one of 8 steps.
        """
        most = min(map(_priority, self.prefills))
        later = step % _LATER_PREFILLS == _LATER_PREFILLS - 1
        prefills = [prefill for prefill in self.prefills if later or _priority(prefill) == most]
        if step % 2:
            return prefills[0]
        return min(prefills, key=lambda prefill: prefill.remaining)

    def joinable(self) -> tuple[Batch, Batch] | None:
        """Two batches that had better be one, the larger first."""
        return self.batches.joinable(self.limits.budget - self._prefilling_need)

    @property
    def _places(self) -> int:
        """How many more sequences may run."""
        return self.max_batch_size - len(self._prefilling) - self.batches.places

    def _begin(self, sequence: Sequence) -> None:
        """Take a sequence from the queue. One whose turn has come by age is as urgent as those that it has passed."""
        priority = self._urgency(sequence)
        sequence.order = (priority, sequence.order[1])
        sequence.yields = self._yields(priority)
        if sequence.yields:
            self._yielded = self._steps
        else:
            self._urgent = priority, self._steps
        self.waiting.begin(sequence)

    def _yields(self, priority: int) -> bool:
        """Whether more urgent sequences have begun lately, and may come at any moment."""
        if self._urgent is None or self.limits.prefix_alignment is not None:
            return False
        most, step = self._urgent
        return priority > most and self._steps - step < _REMEMBERED_STEPS

    def _urgency(self, sequence: Sequence) -> int:
        """The priority that a waiting sequence has now."""
        return self.waiting.priority(sequence, sequence.order[0])

    def _displace(self, count: int, priority: int) -> None:
        """Let the least urgent sequences that decode give up their places to others of a priority."""
        for _ in range(count):
            last = self.batches.last_after(priority)
            if last is None:
                return
            if (error := self.batches.displace(last)) is not None:
                self._left.append((last, error))
            else:
                turn = replace(last.request.turn, priority=last.order[0])
                self.waiting.add_again(last, turn, last.order[1])

    def _candidates(self) -> tuple[list[Sequence], list[PrefixMatch | None]]:
        """Waiting sequences of one priority that may begin now, as many as one forward computes.

        There may be more of them than places, if less urgent sequences decode.
        """
        sequences: list[Sequence] = []
        sources: list[PrefixMatch | None] = []
        prefilling, displaced = self._prefilling, self.batches.displaced
        places, spare = self._places, self.spare
        tokens = 0
        for sequence in self.waiting:
            priority = self._urgency(sequence)
            yields = self._yields(priority)
            if yields and not self.nothing_runs and 0 < self._steps - self._yielded < _BETWEEN_PREFILLS:
                break
            group = self._prefiller.group_of(yields=yields)
            if (sequences and priority != self._urgency(sequences[0])) or tokens >= group:
                break
            if self.batches.paused_before(priority) or not self._has_place(priority, places - len(sequences)):
                break
            if sequence in displaced:
                places -= 1
                continue
            short_only = any(other.order[0] <= priority for other in prefilling)
            if self._passed_over(sequence, prefilling, short_only):
                continue
            alone = self.nothing_runs and not sequences
            need, kept = self.batches.bytes_soon([sequence]), 0 if alone else self._kept_free(priority)
            enough = spare - kept >= need and self.batches.all_can_finish(
                self.limits.budget - kept, [*prefilling, *sequences, sequence]
            )
            if not enough and not alone:
                break
            source = self._reuse.source(sequence, self.batches)
            to_go = len(sequence.ids) - (0 if source is None else source.length)
            sequence.to_go = (to_go, self._store.version)
            sequence.awaits = self._reuse.soon_served(sequence, source, self.prefills, sequences)
            if sequence.awaits is not None or (short_only and to_go > self._prefiller.chunk):
                continue
            spare -= need
            tokens += to_go
            sequences.append(sequence)
            sources.append(source)
            if source is not None and source.logits is not None:
                break  # Nothing is to be computed with it.
        return sequences, sources

    def _has_place(self, priority: int, places: int) -> bool:
        """Whether one more sequence may begin after `-places` less urgent ones, or none, have given up theirs."""
        return places > 0 or self.batches.count_after(priority) > -places

    def _kept_free(self, priority: int) -> int:
        """Bytes that a sequence leaves to more urgent ones."""
        return self.limits.budget // _KEPT_FREE if priority > 0 else 0

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


def _priority(prefill: Prefill) -> int:
    return min(sequence.order[0] for sequence in prefill.sequences)
