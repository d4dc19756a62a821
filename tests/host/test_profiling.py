"""Timings in usage and traces of requests: what a request's time went into."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from deployments.core.errors import ConfigError
from deployments.host.profiling import REQUESTS
from deployments.local import model_app
from tests.seeds.serving import client, listening
from tests.tiny import byte_tokenizer, llama

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def tiny() -> dict[str, Any]:
    return {"model_name": "tiny", "model": llama(), "tokenizer": byte_tokenizer()}


def test_usage_has_timings_where_configured() -> None:
    with listening(model_app(tiny(), id="tiny")) as address, client(address) as api:
        plain = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4)
    assert "total_time" not in (plain.usage.model_extra or {})
    app = model_app(tiny(), id="tiny", api={"usage_timings": True})
    with listening(app) as address, client(address) as api:
        started = time.monotonic()
        done = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=40)
        elapsed = time.monotonic() - started
        usage: Any = done.usage
        assert 0 < usage.time_to_first_token < usage.total_time < elapsed
        assert usage.tokens_per_second == pytest.approx(usage.completion_tokens / usage.total_time, rel=0.01)
        chunks = list(
            api.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}
            )
        )
        streamed: Any = chunks[-1].usage
        assert 0 < streamed.time_to_first_token <= streamed.total_time


def test_the_first_requests_are_traced(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    body = {"messages": HELLO, "max_tokens": 2}
    with listening(model_app(tiny(), id="org/tiny", profile_dir=str(folder))) as address:
        for _ in range(REQUESTS + 1):
            assert requests.post(f"{address}/chat/completions", json=body, timeout=60).status_code == 200
        (file,) = folder.iterdir()
        assert file.name.startswith("org_tiny-")
        names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert "aten::linear" in names


def test_fewer_requests_are_written_when_the_server_ends(tmp_path: Path) -> None:
    with listening(model_app(tiny(), id="tiny", profile_dir=str(tmp_path))) as address:
        requests.post(f"{address}/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_told_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="profile_dir"):
        model_app(tiny(), id="tiny", profile_dir=str(tmp_path / "file" / "traces"))
