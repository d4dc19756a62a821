"""The batches that decode at the same time: when two of them become one, and which sequences pause if memory runs out.

Sequences of very different lengths in one batch make the short ones read the padding of the long one; in two batches
the weights are read twice. Both are bytes, so they are compared.

Few sequences become as long as they may, so they are let in by the bytes they need soon. As they grow, the youngest
pause, with their caches kept, so that the oldest can always end: nothing is computed twice and no text depends on it.
A sequence that is less urgent than one that waits gives up its place in the same way.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass

from deployments.engine.batching.memory import can_all_finish
from deployments.engine.batching.sequence import Batch, Sequence
from deployments.engine.cache.layers import batch_room
from deployments.engine.cache.sequence_bytes import SequenceBytes

_AHEAD = 32
"""Tokens by which a running sequence is taken to be longer: its buffers grow by steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What sequences may use.

    Attributes:
        max_batch_size: sequences computed together.
        budget: bytes for caches, the prefix store's included.
        growth: tokens ahead for which memory is set apart.
        split_bytes: bytes of padding that a batch may read in a step before a batch of their own is worth another read
            of the weights.
        mixes_lengths: sequences of different lengths may share a batch.
        joins: sequences may share a batch at all.
        prefix_alignment: deterministic mode: prefixes are reused at multiples of this many tokens, as far as they were
            computed as a prompt, and sequences are sampled one by one. None otherwise.
        separates_inspected: inspected sequences decode in batches of their own, since others decode in fixed steps.
    """

    max_batch_size: int
    budget: int
    split_bytes: int
    growth: int = 512
    mixes_lengths: bool = True
    joins: bool = True
    prefix_alignment: int | None = None
    separates_inspected: bool = False


class RunningBatches:
    """The running batches.

    Args:
        sequence_bytes: what sequences cost.
        limits: what they may use.
    """

    def __init__(self, sequence_bytes: SequenceBytes, limits: Limits) -> None:
        self.sequence_bytes = sequence_bytes
        self.limits = limits
        self._batches: list[Batch] = []
        self._paused: list[Batch] = []
        self._displaced: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        return iter(tuple(self._batches))

    def __len__(self) -> int:
        return len(self.all)

    @property
    def all(self) -> list[Batch]:
        """Those that decode, and those of one sequence that pause or have given up their place."""
        return self._batches + self._paused + self._displaced

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for batch in self.all for sequence in batch.sequences]

    @property
    def paused(self) -> int:
        """How many sequences pause for memory."""
        return len(self._paused)

    @property
    def places(self) -> int:
        """How many sequences decode, or will as soon as there is memory."""
        return sum(len(batch.sequences) for batch in self._batches + self._paused)

    @property
    def displaced(self) -> list[Sequence]:
        """The sequences that have given up their places."""
        return [sequence for batch in self._displaced for sequence in batch.sequences]

    def count_after(self, priority: int) -> int:
        """How many of the sequences that decode are less urgent than `priority`."""
        return sum(sequence.order[0] > priority for batch in self._batches for sequence in batch.sequences)

    def paused_before(self, priority: int) -> bool:
        """Whether a sequence pauses for memory that is not less urgent than `priority`."""
        return any(batch.sequences[0].order[0] <= priority for batch in self._paused)

    def last_after(self, priority: int) -> Sequence | None:
        """The least urgent sequence that decodes, if it is less urgent than `priority`."""
        decoding = (sequence for batch in self._batches for sequence in batch.sequences)
        last = max(decoding, key=lambda sequence: sequence.order, default=None)
        return last if last is not None and last.order[0] > priority else None

    def displace(self, sequence: Sequence) -> Exception | None:
        """Let a sequence give up its place, with its cache kept; an error if there is no memory: it has left then."""
        return self._pause(sequence, self._displaced)

    def resume(self, sequence: Sequence, budget: int, others: abc.Sequence[Sequence]) -> bool:
        """Let a sequence that has given up its place decode again; False if there is no memory.

        Args:
            budget: bytes for the sequences of batches and `others`.
            others: sequences being prefilled.
        """
        batch = next(batch for batch in self._displaced if sequence in batch.sequences)
        self._displaced.remove(batch)
        self._batches.append(batch)
        spare = budget - sum(self.bytes_soon([other]) for other in others)
        if len(self._batches) > 1 and not (self.reserved <= spare and self.all_can_finish(budget, others)):
            self._batches.remove(batch)
            self._displaced.append(batch)
            return False
        return True

    @property
    def reserved(self) -> int:
        """Bytes that the batches have, or need soon."""
        running = sum(self._taken(batch) for batch in self._batches)
        return running + sum(batch.cache.nbytes for batch in self._paused + self._displaced)

    def bytes_soon(self, sequences: abc.Sequence[Sequence], room: int = 1) -> int:
        """Bytes that some sequences need soon in a batch of `room` sequences."""
        return room * self._widest(
            sequences, [min(sequence.final_length, len(sequence.ids) + self.limits.growth) for sequence in sequences]
        )

    def bytes_at_completion(self, sequences: abc.Sequence[Sequence], room: int = 1) -> int:
        """Bytes that some sequences can need in a batch of `room` sequences."""
        return room * self._widest(sequences, [sequence.final_length for sequence in sequences])

    def all_can_finish(self, budget: int, others: abc.Sequence[Sequence] = ()) -> bool:
        """Whether every sequence can end, the oldest first; `others` are sequences on their way into a batch."""
        sequences = sorted((*self.sequences, *others), key=lambda sequence: sequence.order)
        if sum(self.bytes_at_completion([sequence]) for sequence in sequences) <= budget:
            return True
        paused = {id(batch.sequences[0]) for batch in self._paused + self._displaced}
        ahead = ((sequence, 0 if id(sequence) in paused else _AHEAD) for sequence in sequences)
        return can_all_finish(
            budget,
            (
                (
                    min(self._now(sequence, n), self.bytes_at_completion([sequence])),
                    self.bytes_at_completion([sequence]),
                )
                for sequence, n in ahead
            ),
        )

    def balance(self, budget: int, others: abc.Sequence[Sequence]) -> list[tuple[Sequence, Exception]]:
        """Let the youngest sequences pause if memory is short, and go on if it is not.

        Args:
            budget: bytes for the sequences of batches and `others`.
            others: sequences being prefilled.

        Returns:
            Sequences for whose pause there is no memory, and why: they have left.
        """
        left: list[tuple[Sequence, Exception]] = []
        spare = budget - sum(self.bytes_soon([sequence]) for sequence in others)
        if (
            not self._paused
            and sum(self.bytes_at_completion(b.sequences, b.cache.room) for b in self._batches) <= spare
        ):
            return left
        while len(self._batches) > 1 or any(len(batch.sequences) > 1 for batch in self._batches):
            if self.reserved <= spare and self.all_can_finish(budget, others):
                break
            youngest = max(
                (sequence for batch in self._batches for sequence in batch.sequences),
                key=lambda sequence: sequence.order,
            )
            if (error := self._pause(youngest, self._paused)) is not None:
                left.append((youngest, error))
        while self._paused:
            oldest = self._paused.pop(0)
            self._batches.append(oldest)
            if len(self._batches) > 1 and not (self.reserved <= spare and self.all_can_finish(budget, others)):
                self._batches.remove(oldest)
                self._paused.insert(0, oldest)
                break
        return left

    def batch_of(self, sequence: Sequence) -> Batch | None:
        """The batch a sequence is in."""
        return next((batch for batch in self.all if sequence in batch.sequences), None)

    def add(self, batch: Batch) -> None:
        self._batches.append(batch)

    def remove(self, batch: Batch) -> None:
        next(batches for batches in (self._batches, self._paused, self._displaced) if batch in batches).remove(batch)

    def clear(self) -> None:
        self._batches.clear()
        self._paused.clear()
        self._displaced.clear()

    def joinable(self, budget: int) -> tuple[Batch, Batch] | None:
        """Two batches, the larger one first, that save reading if they join and fit into a budget of bytes."""
        for i, batch in enumerate(self._batches):
            for other in self._batches[:i]:
                if self._worth_joining(batch, other) and self._fits(batch, other, budget):
                    return (other, batch) if len(other.sequences) >= len(batch.sequences) else (batch, other)
        return None

    def _worth_joining(self, a: Batch, b: Batch) -> bool:
        sequences = [*a.sequences, *b.sequences]
        if (
            not self.limits.joins
            or any(sequence.isolated for sequence in sequences)
            or len({(len(sequence.offset), sequence.group) for sequence in sequences}) > 1
        ):
            return False
        if self.limits.separates_inspected and len({sequence.inspected is None for sequence in sequences}) > 1:
            return False
        if not self.limits.mixes_lengths and len({*a.cache.lengths, *b.cache.lengths}) > 1:
            return False
        read, width = self.sequence_bytes.read, max(a.cache.width, b.cache.width)
        padding = sum(len(batch.sequences) * (read(width) - read(batch.cache.width)) for batch in (a, b))
        return padding <= self.limits.split_bytes

    def _fits(self, a: Batch, b: Batch, budget: int) -> bool:
        separate, sequences = self._taken(a) + self._taken(b), [*a.sequences, *b.sequences]
        return self.reserved - separate + self.bytes_soon(sequences, batch_room(len(sequences))) <= budget

    def _pause(self, sequence: Sequence, paused: list[Batch]) -> Exception | None:
        """Set a sequence aside with its cache, which takes a copy of it; without one the sequence leaves."""
        batch = next(batch for batch in self._batches if sequence in batch.sequences)
        alone: Batch | None = batch
        error: Exception | None = None
        if len(batch.sequences) > 1:
            try:
                alone = Batch(batch.cache.copy_sequence(batch.sequences.index(sequence)), [sequence])
            except Exception as failure:
                alone, error = None, failure
            batch.drop(sequence, blank=sequence.steered)
            batch.cache.compact()
        else:
            self._batches.remove(batch)
        if alone is not None:
            paused.append(alone)
            paused.sort(key=lambda batch: batch.sequences[0].order)
        return error

    def _taken(self, batch: Batch) -> int:
        return max(batch.cache.nbytes, self.bytes_soon(batch.sequences, batch.cache.room))

    def _now(self, sequence: Sequence, ahead: int) -> int:
        return self._widest([sequence], [len(sequence.ids) + ahead])

    def _widest(self, sequences: abc.Sequence[Sequence], widths: abc.Sequence[int]) -> int:
        """Bytes of one sequence in a batch as wide as the widest of its sequences."""
        return self.sequence_bytes.of_sequence(max(widths), max(sequence.encoded_length for sequence in sequences))
