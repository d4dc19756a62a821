"""Live requests beside a batch: `test_live_requests_beside_a_batch` in tests/faults has the times."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import requests

from tests.faults import paced
from tests.openai.batches.batching import create, request
from tests.openai.conftest import Server


def test_lines_leave_places_to_live_requests(tmp_path: Path) -> None:
    """At most three quarters of a batch are lines, and beside live requests a quarter of what these leave."""
    server = Server({}, [paced.model("a", pace=0.01, engine={"max_batch_size": 16})], state_dir=str(tmp_path))
    server.start()
    client = server.client()

    def in_use() -> int:
        (replica,) = requests.get(f"{server.url}/health?verbose", timeout=10).json()["data"]
        return sum(model["in_use"] for model in replica["models"])

    def completed() -> int:
        counts = client.batches.retrieve(batch.id).request_counts
        return 0 if counts is None else counts.completed

    message: Any = {"role": "user", "content": "x"}
    live: list[Any] = []
    try:
        batch = create(client, [request(f"{i}", f"{i}", model="a", max_tokens=10) for i in range(4000)])
        while in_use() < 12:
            time.sleep(0.01)
        assert max(in_use() for _ in range(40)) == 12
        for _ in range(4):
            live.append(client.chat.completions.create(model="a", messages=[message], max_tokens=100_000, stream=True))
            next(live[-1])
        # Lines that had begun end.
        while max(in_use() for _ in range(20)) > 4 + 3:
            time.sleep(0.01)
        before = completed()
        assert max(in_use() for _ in range(40)) <= 4 + 3
        while completed() < before + 10:
            time.sleep(0.01)
        for stream in live:
            stream.close()
        while in_use() < 12:
            time.sleep(0.01)
        client.batches.cancel(batch.id)
    finally:
        for stream in live:
            stream.close()
        server.stop()
