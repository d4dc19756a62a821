"""Blocking work beside an event loop, in daemon threads: a hung hook can neither stall the loop nor the exit."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from deployments.core.calls import TURN
from deployments.core.errors import ModelError, last_line
from deployments.engine.base.hook_watch import position
from deployments.engine.base.turns import TurnQueue

T = TypeVar("T")


_Job = tuple[Callable[[], Any], Future[Any]]


class _Jobs(queue.Queue[_Job | None]):
    """Jobs, of which those of different requests take turns; None comes last."""

    def _init(self, maxsize: int) -> None:
        self._turns: TurnQueue[_Job] = TurnQueue()
        self._ends = False

    def _qsize(self) -> int:
        return len(self._turns) + self._ends

    def _put(self, item: _Job | None) -> None:
        if item is None:
            self._ends = True
        else:
            self._turns.add(item, TURN.get())

    def _get(self) -> _Job | None:
        job = next(iter(self._turns), None)
        if job is None:
            self._ends = False
        else:
            self._turns.begin(job)
        return job


class Worker:
    """One thread that runs functions, those of different requests in turn (see `engine/base/turns.py`).

    A function that outlasts its timeout gets the thread to itself.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._start()

    async def run(self, function: Callable[[], T], limit: float | None = None) -> T:
        """The function's result, or its exception.

        Args:
            limit: seconds that the function may take from when it starts; waiting for its turn does not count.

        Raises:
            TimeoutError: it has not returned in time; the message says where it is.
        """
        started: Future[threading.Thread] = Future()
        future: Future[T] = Future()

        def begin() -> T:
            started.set_result(threading.current_thread())
            return function()

        self._jobs.put((begin, future))
        answer = asyncio.wrap_future(future)
        try:
            thread = await asyncio.wrap_future(started)
            return await asyncio.wait_for(answer, limit)
        except TimeoutError:
            self._replace_stuck(thread, future)
            raise TimeoutError(position(thread)) from None
        except asyncio.CancelledError:
            answer.cancel()
            if limit is not None and started.done() and not started.cancelled():
                # Its caller has left, but other calls still wait for this thread.
                asyncio.get_running_loop().call_later(limit, self._replace_stuck, started.result(), future)
            raise

    def put(self, function: Callable[[], object]) -> None:
        """Run a function whose result nobody waits for."""
        self._jobs.put((function, Future()))

    @property
    def thread(self) -> threading.Thread:
        """The thread that runs what comes next."""
        return self._thread

    def stop(self) -> None:
        """End the thread after what is queued."""
        self._jobs.put(None)

    def _start(self) -> None:
        self._jobs = _Jobs()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True)
        self._thread.start()

    def _replace_stuck(self, thread: threading.Thread, future: Future[Any]) -> None:
        """Give up a thread whose function still runs, and keep its waiting jobs."""
        if thread is not self._thread or not future.running():
            return
        stuck = self._jobs
        self._start()
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.put(stuck.get_nowait())
        stuck.put(None)


class Workers:
    """Threads that run functions as they come, the oldest first. Nobody waits for one that hangs.

    Args:
        size: threads at most; they start as they are needed, and stay.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._count = 0
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """The function's result, or its exception. One that is cancelled in time does not run."""
        future: Future[T] = Future()
        self._jobs.put((function, future))
        with self._lock:
            if self._count < self._size:
                self._count += 1
                name = f"{self._name}-{self._count}"
                threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True).start()
        return future

    def stop(self) -> None:
        """End the threads after what is queued; what comes later does not run."""
        with self._lock:
            started, self._count = self._count, self._size
        for _ in range(started):
            self._jobs.put(None)


class LoopThread:
    """An event loop in a daemon thread of its own, started when it is first needed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """A coroutine's result, or its exception; it is cancelled with its caller."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), self._running()))

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True).start()
            return self._loop


def _work(jobs: queue.SimpleQueue[_Job | None] | queue.Queue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        _run(*job)
        # While the thread waits it must not keep alive what the last function was given or returned.
        del job


def _run(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    with contextlib.suppress(InvalidStateError):
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
        except BaseException as error:
            # In the event loop it would end the process.
            future.set_exception(ModelError(f"A function of the model's loader raised {last_line(error)}."))
