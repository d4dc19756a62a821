"""The time between two chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from deployments.engine.base.stream_pace import StreamPace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time, which is 0 at first, when every pace has a chunk."""

    def at(seconds: float) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: seconds)

    at(0.0)
    return at


def test_all_streams_have_their_chunks_together(clock: Callable[[float], None]) -> None:
    pace = StreamPace(0.02)
    with pace.streams(1) as interval, pace.streams(1) as other:
        clock(0.105)
        assert interval() == pytest.approx(0.015)
        clock(0.113)
        assert other() == pytest.approx(0.007)


@pytest.mark.usefixtures("clock")
def test_it_grows_with_the_streams_of_the_process_and_shrinks_when_they_end() -> None:
    pace = StreamPace(0.02, chunks_per_s=250)
    with pace.streams(1) as interval:
        assert interval() == 0.02
        with pace.streams(15) as others:
            assert interval() == 0.02, "they have no token yet"
            assert others() == interval() == others() == pytest.approx(16 / 250)
        assert interval() == 0.02


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("cores", "replicas", "alone", "of_sixteen"),
    [(2, 1, 0.04, 16 / 250), (1, 2, 0.08, 16 / 125), (4, 1, 0.02, 16 / 500), (16, 1, 0.02, 0.02), (8, 8, 0.02, 0.128)],
)
def test_a_replica_with_few_cores_sends_fewer_chunks(
    cores: float, replicas: int, alone: float, of_sixteen: float
) -> None:
    pace = StreamPace.of_replica(0.02, cores, replicas)
    with pace.streams(1) as interval:
        assert interval() == pytest.approx(alone)
        with pace.streams(15) as others:
            assert others() == pytest.approx(of_sixteen)


@pytest.mark.parametrize("pace", [StreamPace.of_replica(0.0, cores=1, replicas=9), StreamPace(0.0)])
def test_without_a_least_time_nothing_waits(pace: StreamPace) -> None:
    with pace.streams(1000) as interval:
        assert interval() == 0
