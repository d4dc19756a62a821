"""From an engine's thread to an event loop: the events of one request, taken in batches."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain

from deployments.core.events import Delta, EngineEvent, is_last
from deployments.core.token_ids import TokenIds
from deployments.engine.base.protocol import Emit


class EventQueue:
    """Collects the events of all choices of one request. Wakes its loop once per batch, not once per event."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._events: list[tuple[int, EngineEvent]] = []
        self._arrived = asyncio.Event()
        self._final = asyncio.Event()
        self._asked = False

    def emitter(self, choice: int) -> Emit:
        """The `emit` of one choice, for the engine's thread."""
        return partial(self._put, choice)

    async def take(self, not_before: float = 0.0) -> list[tuple[int, EngineEvent]]:
        """Everything that has arrived since the last call, in order, with its choice; waits for at least one.

        Args:
            not_before: a time of `time.monotonic()` to gather events until; the last event of a choice cuts it short.
        """
        if (left := not_before - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._final.wait()
        with self._lock:
            self._asked = not self._events
        if self._asked:
            await self._arrived.wait()
        with self._lock:
            events, self._events = self._events, []
            self._arrived.clear()
            self._final.clear()
        return events

    def _put(self, choice: int, event: EngineEvent) -> None:
        final = is_last(event)
        with self._lock:
            self._events.append((choice, event))
            if not final and not self._asked:
                return
            self._asked = False
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it all who could ask
            self._loop.call_soon_threadsafe(self._wake, final)

    def _wake(self, final: bool) -> None:
        # What woke the loop may have been taken already.
        if self._events:
            self._arrived.set()
            if final:
                self._final.set()


_FEW = 1000


def _ids(deltas: Sequence[Delta]) -> Sequence[int]:
    """A few ids as a tuple, many as what crosses to another process as one block."""
    ids = chain.from_iterable(delta.token_ids for delta in deltas)
    return tuple(ids) if len(deltas) < _FEW else TokenIds(ids)


def merge_deltas(choice: int, deltas: Sequence[Delta]) -> Delta:
    """Successive deltas of one choice as one."""
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    last = deltas[-1]
    return Delta(
        choice=choice,
        text="".join(delta.text for delta in deltas),
        token_ids=_ids(deltas),
        logprobs=tuple(entry for entries in logprobs for entry in entries) if logprobs else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cached_tokens=max(delta.cached_tokens for delta in deltas),
        reasoning_tokens=sum(delta.reasoning_tokens for delta in deltas),
    )
