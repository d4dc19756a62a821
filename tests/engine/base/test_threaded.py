"""What every engine with threads does with its requests, whatever it computes."""

from __future__ import annotations

import queue

import pytest

from deployments.core.calls import SamplingParams
from deployments.core.errors import BadRequest, ModelError, Unavailable
from deployments.core.events import Delta, EngineEvent, Failed
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import Emit, EngineRequest
from deployments.engine.base.threaded import ThreadedEngine


class Scripted(ThreadedEngine):
    """Its thread runs a request when the test says so, and dies when it gets an exception."""

    kind = "scripted"

    def __init__(self) -> None:
        super().__init__()
        self.script: queue.Queue[LiveRequest | BaseException | None] = queue.Queue()
        self.admitted: dict[str, LiveRequest] = {}
        self._start("scripted")

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        self.admitted[request.request_id] = self._admit(request, emit)

    def _work(self) -> None:
        while (next_one := self.script.get()) is not None:
            if isinstance(next_one, BaseException):
                raise next_one
            next_one.running = True
            next_one.give(Delta(text="a", token_ids=(1,)))

    def _stop(self) -> None:
        self.script.put(None)


def submit(engine: Scripted, name: str) -> queue.Queue[EngineEvent]:
    events: queue.Queue[EngineEvent] = queue.Queue()
    engine.submit(EngineRequest(request_id=name, input_ids=[1], sampling=SamplingParams(max_tokens=4)), events.put)
    return events


def test_closing_fails_what_waits_at_once_and_the_rest_when_its_time_is_over() -> None:
    engine = Scripted()
    running, waiting = submit(engine, "runs"), submit(engine, "waits")
    engine.script.put(engine.admitted["runs"])
    assert running.get(timeout=30) == Delta(text="a", token_ids=(1,))
    assert (engine.stats().sequences, engine.stats().waiting, engine.stats().generated_tokens) == (1, 1, 1)
    engine.close(timeout=0.01)
    for events in (running, waiting):
        last = events.get_nowait()
        assert isinstance(last, Failed)
        assert isinstance(last.error, Unavailable)
        assert events.empty()
    with pytest.raises(Unavailable, match="being unloaded"):
        submit(engine, "late")
    engine.check()


def test_a_dead_thread_ends_every_request_and_is_reported() -> None:
    engine = Scripted()
    events = submit(engine, "lost")
    engine.script.put(RuntimeError("a bug"))
    last = events.get(timeout=30)
    assert isinstance(last, Failed)
    assert "a bug" in last.error.message
    with pytest.raises(ModelError, match="a bug"):
        engine.check()
    with pytest.raises(Unavailable, match="a bug"):
        submit(engine, "late")
    engine.close()


def test_a_cancelled_request_emits_nothing_and_its_id_is_free() -> None:
    engine = Scripted()
    first = submit(engine, "same")
    with pytest.raises(BadRequest, match="already running"):
        submit(engine, "same")
    old = engine.admitted["same"]
    engine.cancel("same")
    engine.cancel("unknown")
    second = submit(engine, "same")
    old.give(Delta(text="late"))
    old.fail(Unavailable("late"))
    assert first.empty()
    engine.admitted["same"].give(Delta(finish_reason="stop"))
    assert second.get_nowait() == Delta(finish_reason="stop")
    assert engine.stats().waiting == 0
    engine.close()


def test_a_receiver_may_cancel_and_may_raise() -> None:
    engine = Scripted()
    seen: list[EngineEvent] = []

    def emit(event: EngineEvent) -> None:
        seen.append(event)
        engine.cancel("r")
        raise RuntimeError("a bug of the receiver")

    engine.submit(EngineRequest(request_id="r", input_ids=[1], sampling=SamplingParams(max_tokens=4)), emit)
    engine.admitted["r"].give(Delta(text="a"))
    engine.admitted["r"].give(Delta(text="b"))
    assert seen == [Delta(text="a")]
    engine.close()
