"""The engine requests of one call: queued in order, their events taken in batches, the rest cancelled when it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from deployments.core.events import Delta, EngineEvent
from deployments.engine.base.event_queue import EventQueue
from deployments.engine.base.protocol import Engine, EngineRequest

Interval = Callable[[], float]
"""Gives seconds, at any moment."""

_UNTIL_ONE_ENDS = 3600.0


class RunningRequests:
    """Requests that an engine computes, numbered from 0 as they are queued.

    Args:
        interval: gives the seconds between two batches of events, the first excepted; None gathers events until a
            request ends.
    """

    def __init__(self, engine: Engine, *, interval: Interval | None) -> None:
        self._engine = engine
        self._interval = interval
        self._due = time.monotonic() + _UNTIL_ONE_ENDS if interval is None else 0.0
        self._queue = EventQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._queued = 0
        self._running: dict[int, str] = {}

    def __bool__(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._running)

    def submit(self, requests: Iterable[EngineRequest]) -> int:
        """Queue requests, in any thread; none after `close`. Returns how many were queued.

        Raises:
            TroupeError: the engine refuses one of them.
        """
        before = self._queued
        for request in requests:
            with self._lock:
                if self._closed:
                    break
                self._running[self._queued] = request.request_id
                self._engine.submit(request, self._queue.emitter(self._queued))
                self._queued += 1
        return self._queued - before

    async def take(self) -> list[tuple[int, EngineEvent]]:
        """The events since the last batch, each with the number of its request; waits for at least one."""
        events = await self._queue.take(not_before=self._due)
        self._due = time.monotonic() + (self._interval() if self._interval is not None else _UNTIL_ONE_ENDS)
        for number, event in events:
            if isinstance(event, Delta) and event.finish_reason is not None:
                self._running.pop(number, None)
        return events

    def close(self) -> None:
        """Cancel the requests that have not ended."""
        with self._lock:
            self._closed = True
        for request_id in self._running.values():
            self._engine.cancel(request_id)
        self._running.clear()
