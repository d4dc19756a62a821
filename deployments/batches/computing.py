"""One line of a batch: sent as a request, and sent again if that may help."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.batches.client import Compute, LineAnswer, LineCall

_TRANSIENT = (429, 503, 504)
_TRIES = 5
_LONGEST_WAIT_S = 30.0
_LOST = {
    "message": "The model's replica was lost twice while it computed this line, the second time without other lines.",
    "type": "server_error",
    "param": None,
    "code": "unavailable",
}


class LineSender:
    """Sends lines, each until it has an answer that lasts.

    A line whose replica was lost may be what ends replicas. It is sent again while no other line is computed, and is
    given up if its replica is lost once more: it then ends no others, and the lines beside it are not blamed.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._changed = asyncio.Condition()
        self._running = 0
        self._suspected = 0

    async def answer(self, call: LineCall) -> LineAnswer:
        """The answer of a line, asked for again while its error is one that passes."""
        tries, lost = 0, False
        while True:
            async with self._turn(alone=lost):
                answer = await self._compute(call)
            tries += 1
            if answer.replica_lost and lost:
                return LineAnswer(status=503, body=json.dumps({"error": _LOST}).encode())
            lost = lost or answer.replica_lost
            if answer.status not in _TRANSIENT or (tries >= _TRIES and not _passes(answer)):
                return answer
            await asyncio.sleep(min(_LONGEST_WAIT_S, 1.0 if answer.retry_after is None else answer.retry_after))

    @asynccontextmanager
    async def _turn(self, *, alone: bool) -> AsyncIterator[None]:
        async with self._changed:
            self._suspected += alone
            try:
                await self._changed.wait_for(lambda: not (self._running if alone else self._suspected))
            except asyncio.CancelledError:
                self._leave(alone)
                raise
            self._running += 1
        try:
            yield
        finally:
            async with self._changed:
                self._running -= 1
                self._leave(alone)

    def _leave(self, alone: bool) -> None:
        self._suspected -= alone
        self._changed.notify_all()


def _passes(answer: LineAnswer) -> bool:
    """Whether an error ends at some time, whatever the request is: nobody answers now, or the queue is full."""
    code = answer.error.get("code")
    return code == "unavailable" or (answer.status == 429 and code != "insufficient_quota")
