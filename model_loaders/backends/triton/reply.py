"""The events of one request: none after the last, none after a cancellation."""

from __future__ import annotations

import threading

from deployments.core.errors import TroupeError
from deployments.core.events import Delta, EngineEvent, Failed
from deployments.engine.base.protocol import Emit


class Reply:
    """Where the events of a request go.

    Attributes:
        active: neither ended nor cancelled.
        tokens: how many have been given out.
    """

    def __init__(self, emit: Emit) -> None:
        self.active = True
        self.tokens = 0
        self._emit = emit
        self._lock = threading.Lock()

    def give(self, event: EngineEvent | None) -> None:
        """Emit an event; one with a finish_reason is the last."""
        with self._lock:
            if event is None or not self.active:
                return
            if isinstance(event, Delta):
                self.tokens += len(event.token_ids)
                self.active = event.finish_reason is None
            self._emit(event)

    def fail(self, error: TroupeError) -> None:
        """End with an error."""
        with self._lock:
            if self.active:
                self.active = False
                self._emit(Failed(error))

    def cancel(self) -> None:
        """End without a word."""
        with self._lock:
            self.active = False
