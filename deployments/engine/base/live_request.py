"""A request of an engine, from submit to its last event."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

from deployments.core.errors import TroupeError
from deployments.core.events import Delta, EngineEvent, Failed, is_last
from deployments.engine.base.protocol import Emit, EngineRequest

logger = logging.getLogger(__name__)


class LiveRequest:
    """A request and where its events go: none after the last event, none after a cancellation. Safe in any thread.

    Args:
        request: as submitted.
        emit: takes the events.
        counts: its `generated_tokens` grows by what is emitted, if it is given.
        on_end: called once, before the last event or at the cancellation.

    Attributes:
        active: neither ended nor canceled.
        running: being computed; a request that is not running waits.
    """

    __slots__ = ("_counts", "_emit", "_lock", "_on_end", "active", "request", "running")

    def __init__(
        self,
        request: EngineRequest,
        emit: Emit,
        counts: Counter[str] | None = None,
        on_end: Callable[[LiveRequest], None] | None = None,
    ) -> None:
        self.request = request
        self.active = True
        self.running = False
        self._emit = emit
        self._counts = counts
        self._on_end = on_end
        # An event's receiver may cancel the request.
        self._lock = threading.RLock()

    def give(self, event: EngineEvent) -> None:
        """Emit an event. `Failed` and a `Delta` with a finish_reason are the last."""
        with self._lock:
            if not self.active:
                return
            if isinstance(event, Delta) and self._counts is not None:
                self._counts["generated_tokens"] += len(event.token_ids)
            if is_last(event):
                self._end()
            try:
                self._emit(event)
            except Exception:
                logger.exception("An event of request %s could not be delivered.", self.request.request_id)

    def fail(self, error: TroupeError) -> None:
        """End with an error."""
        self.give(Failed(error))

    def cancel(self) -> None:
        """End without an event."""
        with self._lock:
            if self.active:
                self._end()

    def _end(self) -> None:
        self.active = False
        if self._on_end is not None:
            self._on_end(self)
