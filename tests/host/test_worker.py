"""Workers: order, hangs, cancellation, and nothing kept alive."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import pytest

from deployments.host.worker import Worker

pytestmark = pytest.mark.usefixtures("all_is_walked")


class Thing:
    """Something large that must not outlive its use."""


def test_functions_run_in_order_and_raise_what_they_raise() -> None:
    async def main() -> None:
        worker, seen = Worker("w"), []
        await asyncio.gather(*(worker.run(lambda i=i: seen.append(i)) for i in range(20)))  # type: ignore[misc]
        assert seen == list(range(20))
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 // 0)
        assert await worker.run(lambda: "still there") == "still there"
        worker.stop()

    asyncio.run(main())


def test_a_hung_function_keeps_its_thread_and_the_others_get_a_new_one() -> None:
    async def main() -> None:
        worker, release = Worker("w"), threading.Event()
        hung = asyncio.create_task(worker.run(lambda: release.wait(10), 0.1))
        await asyncio.sleep(0)
        behind = asyncio.create_task(worker.run(lambda: "served", 5))
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"threading.py, line \d+ in wait"):
            await hung
        assert await behind == "served"
        assert time.monotonic() - began < 2
        release.set()
        worker.stop()

    asyncio.run(main())


def test_what_was_queued_by_one_who_left_is_not_run() -> None:
    async def main() -> None:
        worker, release, ran = Worker("w"), threading.Event(), []
        first = asyncio.create_task(worker.run(lambda: release.wait(10)))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(worker.run(lambda: ran.append("second")))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.sleep(0.01)
        release.set()
        assert await first
        assert await worker.run(lambda: "third") == "third"
        assert ran == []
        worker.stop()

    asyncio.run(main())


def test_an_idle_thread_keeps_neither_argument_nor_result_alive() -> None:
    async def main() -> None:
        worker = Worker("w")
        given, made = Thing(), None
        made = await worker.run(lambda given=given: Thing())  # type: ignore[misc]
        references = weakref.ref(given), weakref.ref(made)
        del given, made
        await asyncio.sleep(0.05)
        gc.collect()
        assert [reference() for reference in references] == [None, None]
        worker.stop()

    asyncio.run(main())


def test_stopping_ends_the_thread_after_its_work() -> None:
    async def main() -> None:
        worker = Worker("w")
        slow = asyncio.create_task(worker.run(lambda: time.sleep(0.05) or "done"))
        await asyncio.sleep(0.01)
        worker.stop()
        assert await slow == "done"
        worker.thread.join(1)
        assert not worker.thread.is_alive()

    asyncio.run(main())


def test_waiting_for_the_thread_does_not_count() -> None:
    async def main() -> None:
        worker, gate = Worker("w"), threading.Event()
        first = asyncio.create_task(worker.run(lambda: gate.wait(10)))
        later = [asyncio.create_task(worker.run(lambda: "done", 0.2)) for _ in range(3)]
        await asyncio.sleep(0.5)
        gate.set()
        assert await asyncio.gather(*later) == ["done"] * 3
        assert await first
        worker.stop()

    asyncio.run(main())


def test_a_hung_function_whose_caller_has_left_holds_nobody_up() -> None:
    async def main() -> None:
        worker, started, release = Worker("w"), threading.Event(), threading.Event()

        def hang() -> None:
            started.set()
            release.wait(30)

        hung = asyncio.create_task(worker.run(hang, 0.1))
        await asyncio.to_thread(started.wait, 10)
        hung.cancel()
        assert await asyncio.wait_for(worker.run(lambda: "served"), 10) == "served"
        release.set()
        worker.stop()

    asyncio.run(main())
