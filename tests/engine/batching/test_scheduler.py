"""Which sequences begin when, without a model's forward."""

from __future__ import annotations

from typing import Any

from deployments.core.calls import SamplingParams
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.batching.sequence import Sequence
from tests.engine.architectures import decoder
from tests.engine.running import prompt
from tests.engine.stepped import Stepped


class Queue(Stepped):
    """A scheduler, and sequences made by hand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(decoder("llama"), **options)
        self.scheduler = self.loop.scheduler
        self._count = 0

    def made(self, *lengths: int) -> list[Sequence]:
        """New sequences that nobody has queued."""
        sequences = []
        for length in lengths:
            ids, sampling = prompt(self._count, length), SamplingParams(max_tokens=8, temperature=0.0)
            request = EngineRequest(request_id=str(self._count), input_ids=ids, sampling=sampling)
            sequences.append(self.sequence(request, lambda event: None))
            self._count += 1
        return sequences

    def enter(self, *lengths: int) -> list[Sequence]:
        """New sequences, queued."""
        sequences = self.made(*lengths)
        for sequence in sequences:
            self.scheduler.add(sequence)
        return sequences

    def begin(self) -> list[Sequence] | None:
        """The sequences that begin now, as the loop would let them."""
        group = self.scheduler.next_group()
        if group is None:
            return None
        self.scheduler.prefills.append(self.loop.prefiller.begin(*group))
        return group[0]


def test_first_come_first_served_as_far_as_sequences_go() -> None:
    queue = Queue(max_batch_size=3)
    rows = queue.enter(10, 12, 11, 10)
    assert queue.begin() == rows[:3]
    assert queue.begin() is None
    assert list(queue.scheduler.waiting) == rows[3:]


def test_whole_prompts_of_two_chunks_begin_together() -> None:
    queue = Queue(prefill_chunk=32)
    rows = queue.enter(16, 16, 30, 16)
    assert queue.begin() == rows[:2], "three of thirty, padded, would be too many"
    assert queue.begin() is None, "what runs is done in the next forward"
    queue.scheduler.prefills.clear()
    assert queue.begin() == rows[2:]


def test_a_long_prompt_lets_a_short_one_pass_and_no_second_long_one() -> None:
    queue = Queue(prefill_chunk=16)
    long, other, short, late = queue.enter(100, 90, 8, 7)
    assert queue.begin() == [long]
    assert queue.begin() == [short, late]
    assert queue.begin() is None
    assert list(queue.scheduler.waiting) == [other]
    turns = [queue.scheduler.next_prefill(step).sequences for step in range(4)]
    assert turns == [[short, late], [long], [short, late], [long]]


def test_sequences_that_no_bytes_are_left_for_wait_and_the_first_never_does() -> None:
    queue = Queue(limits=lambda sizes: {"budget": sizes.of_sequence(200 + 8) * 3 // 2})
    queue.enter(200, 200)
    first = queue.begin()
    assert first is not None
    assert [len(row.ids) for row in first] == [200]
    assert queue.begin() is None
    assert len(queue.scheduler.waiting) == 1


def test_what_is_queued_first_keeps_its_order() -> None:
    queue = Queue()
    a, b, c = queue.enter(5, 6, 7)
    queue.scheduler.waiting.clear()
    queue.scheduler.add(c)
    queue.scheduler.queue_first([a, b])
    assert list(queue.scheduler.waiting) == [a, b, c]
