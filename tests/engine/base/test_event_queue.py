"""From the engine's thread to the loop: nothing lost, nothing out of order, the end at once."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from deployments.core.errors import ModelError
from deployments.core.events import Delta, Failed
from deployments.engine.base.event_queue import EventQueue, merge_deltas


def test_every_event_of_many_threads_arrives_in_its_order() -> None:
    async def main() -> None:
        inbox, count = EventQueue(), 2000

        def produce(choice: int) -> None:
            emit = inbox.emitter(choice)
            for i in range(count):
                emit(Delta(token_ids=(i,)))

        threads = [threading.Thread(target=produce, args=(choice,)) for choice in range(4)]
        for thread in threads:
            thread.start()
        got: dict[int, list[int]] = {choice: [] for choice in range(4)}
        batches = 0
        while sum(map(len, got.values())) < 4 * count:
            for choice, event in await asyncio.wait_for(inbox.take(), 5):
                assert isinstance(event, Delta)
                got[choice].append(event.token_ids[0])
            batches += 1
        assert all(tokens == list(range(count)) for tokens in got.values())
        assert batches < 4 * count

    asyncio.run(main())


def test_events_are_gathered_until_their_time_but_an_end_comes_at_once() -> None:
    async def main() -> None:
        inbox = EventQueue()
        emit = inbox.emitter(0)
        emit(Delta(text="a"))
        began = time.monotonic()
        asyncio.get_running_loop().call_later(0.02, emit, Delta(text="b"))
        assert len(await inbox.take(began + 0.1)) == 2
        assert 0.09 < time.monotonic() - began < 0.5
        for last in (Delta(finish_reason="stop"), Failed(ModelError("x"))):
            emit(Delta(text="c"))
            asyncio.get_running_loop().call_later(0.02, emit, last)
            began = time.monotonic()
            assert [event for _, event in await inbox.take(began + 5)][-1] == last
            assert time.monotonic() - began < 1

    asyncio.run(main())


def test_the_loop_is_not_woken_for_events_that_wait_for_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        loop, woken = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: woken.append(args) or wake(*args))
        inbox = EventQueue()
        emit = inbox.emitter(0)
        taken = asyncio.create_task(inbox.take(time.monotonic() + 0.2))
        await asyncio.sleep(0.01)
        for _ in range(10):
            emit(Delta(text="a"))
        assert len(await taken) == 10
        return len(woken)

    assert asyncio.run(main()) == 0


def test_an_engine_that_outlives_the_loop_is_not_disturbed() -> None:
    async def main() -> EventQueue:
        return EventQueue()

    inbox = asyncio.run(main())
    inbox.emitter(0)(Delta(text="late"))


def test_merged_deltas_say_what_the_parts_said() -> None:
    merged = merge_deltas(
        3,
        [
            Delta(text="a", token_ids=(1,), cached_tokens=5),
            Delta(token_ids=(2,)),
            Delta(text="bc", token_ids=(3,), finish_reason="stop", stop_reason="x"),
        ],
    )
    assert merged == Delta(
        choice=3, text="abc", token_ids=(1, 2, 3), finish_reason="stop", stop_reason="x", cached_tokens=5
    )
