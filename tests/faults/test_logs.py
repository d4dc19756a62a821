"""A request's id in the lines of the ingress and of the replica, as text and as JSON."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import requests

from tests.faults.clients import ask
from tests.faults.conftest import Say


def lines(deployment: str, request_id: str) -> list[str]:
    """The log lines of a deployment's processes that name a request."""
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    files = [file for file in logs.glob("replica_*") if deployment in file.name]
    return [line for file in files for line in file.read_text().splitlines() if request_id in line]


async def both(request_id: str) -> tuple[list[str], list[str]]:
    """The lines of ingress and replica, once either has some."""
    for _ in range(100):
        found = lines("OpenAIIngress", request_id), lines("ModelReplica", request_id)
        if all(found) and any("outcome" in line for line in found[1]):
            return found
        await asyncio.sleep(0.05)
    return found


def test_a_mistake_of_a_client_leaves_no_traceback_in_the_replicas_log(capped: str) -> None:
    """Ray logs what a method raises; the errors that a client is told of are returned."""
    asked = {
        "/v1/tokenize": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "/v1/completions/render": {"prompt": "abc"},
        "/v1/chat/completions/render": {"messages": [{"role": "user", "content": "a"}] * 3},
    }
    statuses = {}
    for path, body in asked.items():
        request_id = f"mistake-{time.time_ns()}"
        headers = {"x-request-id": request_id}
        body = {"model": "short", **body}
        statuses[path] = requests.post(capped + path, json=body, headers=headers, timeout=60).status_code
        assert [line for line in lines("ModelReplica", request_id) if "ERROR" in line or "Traceback" in line] == []
    assert set(statuses.values()) == {400}, statuses


@pytest.fixture(params=["TEXT", "JSON"])
def logging(request: pytest.FixtureRequest) -> tuple[str, str]:
    """An encoding, and an application that logs in it."""
    fixtures = {"TEXT": "capped", "JSON": "two_replicas"}
    return request.param, request.getfixturevalue(fixtures[request.param])


def test_the_request_id_is_in_the_logs_of_ingress_and_replica(logging: tuple[str, str], say: Say) -> None:
    encoding, url = logging
    request_id = f"trace-{encoding}-{time.time_ns()}"

    async def main() -> None:
        reply = await ask(url, "a", max_tokens=3, headers={"x-request-id": request_id})
        assert reply.headers["x-request-id"] == request_id
        call = reply.json["id"]
        ingress, replica = await both(request_id)
        assert any("/v1/chat/completions" in line for line in ingress)
        (ended,) = [line for line in replica if "outcome" in line]
        if encoding == "TEXT":
            assert re.search(rf"call={call}-[0-9a-f]+ model=a outcome=ok tokens=3", ended)
        else:
            fields: dict[str, Any] = json.loads(ended)
            assert fields["request_id"] == request_id
            assert fields["call"].startswith(f"{call}-")
            assert (fields["model"], fields["outcome"], fields["tokens"]) == ("a", "ok", 3)
            assert 0 < fields["first_token"] < fields["seconds"]
            assert all(json.loads(line)["request_id"] == request_id for line in ingress)
        left = f"left-{request_id}"
        await ask(url, "a", max_tokens=5000, stream=True, leave_after=2, headers={"x-request-id": left})
        _, replica = await both(left)
        assert any("cancelled" in line for line in replica)
        say(f"{len(ingress)} lines of the ingress and {len(replica)} of the replica name the request")

    asyncio.run(main())
