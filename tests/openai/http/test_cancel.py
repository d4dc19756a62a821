"""A client that goes away stops its generation."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import requests

from deployments.openai.http.cancel import until_disconnect
from tests.openai import scripted
from tests.openai.conftest import Serve, Server


def cancelled() -> int:
    return sum(len(engine.cancelled) for engine in scripted.ENGINES)


def started() -> int:
    return sum(len(engine.seen) for engine in scripted.ENGINES)


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.01)
    return time.monotonic() - begun


def send(server: Server, **fields: Any) -> socket.socket:
    body = json.dumps({"model": "org/scripted", **fields}).encode()
    path = "completions" if "prompt" in fields else "chat/completions"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    head = (
        f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


CALLS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "[wait 0.1]" + "x" * 500}]},
    {"messages": [{"role": "user", "content": "[hold 60]abc"}]},
    {"prompt": ["[wait 0.1]" + "x" * 500], "max_tokens": 400},
]


@pytest.mark.parametrize("fields", CALLS)
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_cancels(server: Server, fields: dict[str, Any], stream: bool) -> None:
    before, begun = cancelled(), started()
    connection = send(server, **fields, stream=stream)
    wait_for(lambda: started() > begun)
    assert cancelled() == before
    connection.close()
    assert wait_for(lambda: cancelled() == before + 1) < 1.0
    assert requests.get(server.url + "/health", timeout=5).status_code == 200


def test_leaving_in_the_middle_of_a_stream_cancels(server: Server) -> None:
    before = cancelled()
    connection = send(server, messages=[{"role": "user", "content": "[wait 0.05]" + "x" * 500}], stream=True)
    received = b""
    while b'"content":"x' not in received:
        received += connection.recv(4096)
    connection.close()
    assert wait_for(lambda: cancelled() == before + 1) < 1.0


def test_a_finished_answer_cancels_nothing(server: Server) -> None:
    before = cancelled()
    connection = send(server, messages=[{"role": "user", "content": "abc"}])
    assert b"abc" in connection.recv(4096)
    connection.close()
    time.sleep(0.1)
    assert cancelled() == before


@pytest.mark.parametrize("stream", [False, True])
def test_heartbeats_outlive_a_read_timeout(serve: Serve, stream: bool) -> None:
    beating = serve(heartbeat_seconds=0.1)
    client = beating.client(timeout=0.5)
    messages: Any = [{"role": "user", "content": "[hold 1.2]abc"}]
    answer: Any = client.chat.completions.create(model="org/scripted", messages=messages, stream=stream)
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        if stream
        else answer.choices[0].message.content
    )
    assert text == "abc"


def test_an_error_before_the_first_heartbeat_has_its_status(serve: Serve) -> None:
    beating = serve(heartbeat_seconds=5)
    body = {"model": "org/scripted", "messages": [{"role": "user", "content": "[fail out_of_memory]"}]}
    assert requests.post(beating.url + "/v1/chat/completions", json=body, timeout=5).status_code == 503


def test_an_error_after_a_heartbeat_is_the_body(serve: Serve) -> None:
    beating = serve(heartbeat_seconds=0.05)
    body = {"model": "org/scripted", "messages": [{"role": "user", "content": "[hold 0.3][fail out_of_memory]"}]}
    response = requests.post(beating.url + "/v1/chat/completions", json=body, timeout=5)
    assert response.status_code == 200
    assert response.json()["error"]["code"] == "out_of_memory"


def test_leaving_between_heartbeats_cancels(serve: Serve) -> None:
    beating = serve(heartbeat_seconds=0.05)
    before, begun = cancelled(), started()
    connection = send(beating, messages=[{"role": "user", "content": "[hold 60]abc"}])
    wait_for(lambda: started() > begun)
    time.sleep(0.2)
    connection.close()
    assert wait_for(lambda: cancelled() == before + 1) < 1.0


@pytest.mark.parametrize("turns", range(6))
def test_a_cancel_on_top_of_a_disconnect_leaves_no_work_behind(turns: int) -> None:
    """Ray Serve does both when a client leaves, in either order and any number of turns of the loop apart."""

    async def main() -> None:
        gone = asyncio.Event()
        ended = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        request = asyncio.ensure_future(until_disconnect(receive, work()))
        await asyncio.sleep(0.01)
        gone.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait((request,))
        assert ended.is_set()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
