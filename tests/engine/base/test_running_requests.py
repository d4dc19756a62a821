"""The requests of one call: numbered, taken in batches, cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from deployments.core.calls import SamplingParams
from deployments.core.errors import BadRequest
from deployments.core.events import Delta
from deployments.engine.base.protocol import Emit, EngineRequest
from deployments.engine.base.running_requests import RunningRequests


class Told:
    """An engine whose events come when the test says so."""

    def __init__(self) -> None:
        self.emits: list[Emit] = []
        self.cancelled: list[str] = []

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        if request.request_id == "refused":
            raise BadRequest("no")
        self.emits.append(emit)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


def requests(*names: str) -> list[EngineRequest]:
    return [EngineRequest(request_id=name, input_ids=[1], sampling=SamplingParams()) for name in names]


def with_running(main: Callable[[Told, RunningRequests], Coroutine[Any, Any, None]], interval: float | None) -> Told:
    engine = Told()

    async def run() -> None:
        given = None if interval is None else lambda: interval
        running = RunningRequests(engine, interval=given)  # type: ignore[arg-type]
        await asyncio.wait_for(main(engine, running), 20)

    asyncio.run(run())
    return engine


def test_numbers_go_on_and_only_what_has_not_ended_is_cancelled() -> None:
    async def main(engine: Told, running: RunningRequests) -> None:
        assert running.submit(requests("a", "b")) == 2
        assert running.submit(requests("c")) == 1
        engine.emits[2](Delta(text="x", finish_reason="stop"))
        assert [number for number, _ in await running.take()] == [2]
        assert running
        running.close()
        assert not running
        assert running.submit(requests("d")) == 0

    assert with_running(main, 0.0).cancelled == ["a", "b"]


def test_without_an_interval_events_are_gathered_until_a_request_ends() -> None:
    async def main(engine: Told, running: RunningRequests) -> None:
        running.submit(requests("a", "b"))
        taking = asyncio.create_task(running.take())
        for emit in engine.emits:
            emit(Delta(text="1"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not taking.done()
        engine.emits[1](Delta(text="2", finish_reason="stop"))
        assert [number for number, _ in await taking] == [0, 1, 1]
        assert running

    with_running(main, None)


def test_what_was_queued_before_a_refusal_is_cancelled() -> None:
    async def main(engine: Told, running: RunningRequests) -> None:
        with pytest.raises(BadRequest):
            running.submit(requests("a", "refused", "b"))
        running.close()

    assert "a" in with_running(main, 0.0).cancelled
