"""What an engine has emitted, by request id."""

from __future__ import annotations

import queue
from collections import defaultdict

from deployments.core.events import Delta, EngineEvent, Failed, is_last
from deployments.engine.base.protocol import Emit


class Emitted:
    """The events of requests, each in a queue of its own."""

    def __init__(self) -> None:
        self.events: dict[str, queue.Queue[EngineEvent]] = defaultdict(queue.Queue)

    def emit(self, request_id: str) -> Emit:
        return self.events[request_id].put

    def take(self, request_id: str = "r") -> list[EngineEvent]:
        """All events of a request, once the last has come."""
        events = []
        while True:
            events.append(self.events[request_id].get(timeout=30))
            if is_last(events[-1]):
                assert self.events[request_id].empty()
                return events


def deltas(events: list[EngineEvent]) -> list[Delta]:
    for event in events:
        assert not isinstance(event, Failed), event
    return [event for event in events if isinstance(event, Delta)]
