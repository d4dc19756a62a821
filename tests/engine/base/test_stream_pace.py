"""The time between two chunks of a stream."""

from __future__ import annotations

import pytest

from deployments.engine.base.stream_pace import StreamPace


def test_it_grows_with_the_streams_of_the_process_and_shrinks_when_they_end() -> None:
    pace = StreamPace(0.02, chunks_per_s=250)
    with pace.streams(1) as interval:
        assert interval() == 0.02
        with pace.streams(15) as others:
            assert interval() == 0.02, "they have no token yet"
            assert others() == interval() == others() == pytest.approx(16 / 250)
        assert interval() == 0.02


@pytest.mark.parametrize("pace", [StreamPace(0.0, chunks_per_s=1), StreamPace(0.0)])
def test_without_a_least_time_nothing_waits(pace: StreamPace) -> None:
    with pace.streams(1000) as interval:
        assert interval() == 0
