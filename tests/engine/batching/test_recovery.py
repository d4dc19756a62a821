"""After an out-of-memory error fewer sequences run, and then one more at a time."""

from __future__ import annotations

import pytest
import torch

from tests.engine.batching.test_scheduler import Queue


@pytest.mark.parametrize(("running", "left"), [(0, 6), (2, 7), (9, 8)])
def test_fewer_sequences_run_and_then_one_more_at_a_time(running: int, left: int) -> None:
    queue = Queue(max_batch_size=16)
    scheduler, recovery = queue.scheduler, queue.loop.recovery
    queue.enter(*[9] * running)
    assert len(queue.begin() or ()) == running
    failed = queue.made(*[9] * 12)
    recovery.after_forward(failed, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert scheduler.max_batch_size == left
    assert list(scheduler.waiting) == failed, "they are computed again, before all others"
    assert all(sequence.isolated for sequence in failed)
    seen = []
    for _ in range(64 * 16):
        recovery.end_step()
        seen.append(scheduler.max_batch_size)
    assert seen[:64] == [left] * 63 + [left + 1]
    assert seen[-1] == 16


def test_a_failure_that_is_not_memory_leaves_the_batch_size() -> None:
    queue = Queue(max_batch_size=16)
    failed = queue.made(9, 9)
    queue.loop.recovery.after_forward(failed, RuntimeError("a bug"))
    assert queue.scheduler.max_batch_size == 16
    assert [sequence.attempts for sequence in failed] == [1, 1]
    queue.loop.recovery.decoded(failed)
    assert not any(sequence.isolated or sequence.attempts for sequence in failed)
