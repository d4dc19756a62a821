"""From an engine's thread to an event loop: the events of one request, taken in batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import partial

from deployments.engine.protocol import Emit
from deployments.messages import Delta, EngineEvent


class Inbox:
    """Collects the events of all choices of one request. Wakes its loop once per batch, not once per event."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._events: list[tuple[int, EngineEvent]] = []
        self._arrived = asyncio.Event()
        self._woken = False

    def emitter(self, choice: int) -> Emit:
        """The `emit` of one choice, for the engine's thread."""
        return partial(self._put, choice)

    async def take(self) -> list[tuple[int, EngineEvent]]:
        """Everything that has arrived since the last call, in order, with its choice; waits for at least one."""
        await self._arrived.wait()
        with self._lock:
            events, self._events = self._events, []
            self._woken = False
            self._arrived.clear()
        return events

    def _put(self, choice: int, event: EngineEvent) -> None:
        with self._lock:
            self._events.append((choice, event))
            if self._woken:
                return
            self._woken = True
        self._loop.call_soon_threadsafe(self._arrived.set)


def merge_deltas(choice: int, deltas: Sequence[Delta]) -> Delta:
    """Successive deltas of one choice as one."""
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    last = deltas[-1]
    return Delta(
        choice=choice,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for entries in logprobs for entry in entries) if logprobs else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cached_tokens=max(delta.cached_tokens for delta in deltas),
    )
