"""What an engine has emitted, by request id."""

from __future__ import annotations

from collections import defaultdict

from deployments.core.events import Delta, EngineEvent, Failed
from deployments.engine.base.protocol import Emit
from tests.engine.running import Answer


class Emitted:
    """The answers to requests. An id can be used again once its request has ended."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = defaultdict(lambda: Answer(""))

    def emit(self, request_id: str) -> Emit:
        return self.answers[request_id].emit

    def take(self, request_id: str = "r") -> list[EngineEvent]:
        """All events of a request, once the last has come."""
        answer = self.answers[request_id].end()
        del self.answers[request_id]
        return [answer.next() for _ in range(answer.events.qsize())]


def deltas(events: list[EngineEvent]) -> list[Delta]:
    for event in events:
        assert not isinstance(event, Failed), event
    return [event for event in events if isinstance(event, Delta)]
