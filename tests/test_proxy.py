"""What Serve's proxy answers when no application does, as clients of the OpenAI API get it."""

from __future__ import annotations

import asyncio
import json

import pytest
from ray.serve._private.common import RequestMetadata
from ray.serve._private.http_util import MessageQueue
from ray.serve._private.proxy import HTTPProxy
from ray.serve._private.proxy_router import ProxyRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.proxy import OpenAIErrors, shape_errors
from deployments.readiness import Waiting


def answer(
    serve: ASGIApp, target: tuple[str, str] | None = None, path: str = "/v1/models", receive: Receive | None = None
) -> tuple[int, dict[str, str], bytes]:
    """What a client gets if Serve answers so."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def leave() -> Message:
        return {"type": "http.disconnect"}

    async def ask() -> None:
        app = OpenAIErrors(serve, lambda path: target, Waiting())
        await app({"type": "http", "method": "GET", "path": path, "headers": []}, receive or leave, send)

    asyncio.run(ask())
    start, *rest = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, b"".join(message.get("body", b"") for message in rest)


@pytest.mark.parametrize("text", ["OpenAIIngress is unavailable because it failed to deploy.", "", "x\ny"])
def test_nobody_to_answer_is_an_error_object(text: str) -> None:
    status, headers, body = answer(PlainTextResponse(text, 503))
    error = json.loads(body)["error"]
    assert (status, headers["content-type"], headers["retry-after"]) == (503, "application/json", "5")
    assert int(headers["content-length"]) == len(body)
    assert error["type"] == "server_error"
    assert error["message"].startswith("The application has no replica that answers: ")
    assert (text.splitlines() or ["no reason is known"])[-1] in error["message"]
    assert "serve status" in error["message"]


def test_an_unknown_path_is_an_error_object() -> None:
    status, _, body = answer(
        PlainTextResponse("Path '/x' not found. Ping http://.../-/routes for available routes.", 404)
    )
    assert status == 404
    assert "No application is served at /v1/models" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "response", [PlainTextResponse("ok"), JSONResponse({"error": 1}, 503), PlainTextResponse("x", 404)]
)
def test_other_answers_stay(response: Response) -> None:
    assert answer(response)[::2] == (response.status_code, response.body)


async def says_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """As Serve does when the process that has the request is killed."""


def begins(content_type: bytes) -> ASGIApp:
    """Serve's answer when the process is killed after its first words."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})

    return app


def test_a_request_whose_process_is_lost_is_an_error_object() -> None:
    status, headers, body = answer(says_nothing)
    assert (status, headers["content-type"], headers["retry-after"]) == (503, "application/json", "2")
    assert json.loads(body)["error"]["type"] == "server_error"


def test_a_stream_whose_process_is_lost_ends_with_an_error() -> None:
    status, _, body = answer(begins(b"text/event-stream; charset=utf-8"))
    first, error, done, rest = body.split(b"\n\n")
    assert (status, first, done, rest) == (200, b"data: {}", b"data: [DONE]", b"")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "unavailable"


def test_another_answer_that_breaks_off_stays_broken() -> None:
    """Its client notices that the connection is closed too early."""
    assert answer(begins(b"application/json"))[::2] == (200, b"data: {}\n\n")


def test_serves_own_routes_answer_while_no_application_does() -> None:
    ok = PlainTextResponse("success")
    assert answer(ok, ("troupe", "OpenAIIngress"), "/-/healthz")[::2] == (200, b"success")
    assert answer(ok, None)[::2] == (200, b"success")


def lost_body(takers: list[str]) -> tuple[int, dict[str, str], bytes, list[Message]]:
    """What a client gets if one process after another asks for a request's body, and what the last is given.

    The proxy is Serve's own; what it sends to a replica is played here.
    """
    shape_errors()
    proxy = HTTPProxy("node", "127.0.0.1", True, ProxyRouter(lambda *args, **kwargs: None), "proxy")
    given: list[Message] = []
    arrived = asyncio.Event()

    async def client() -> Message:
        if arrived.is_set():
            await asyncio.Event().wait()
        arrived.set()
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        queue = proxy.asgi_receive_queues["1"] = MessageQueue()
        receiving = asyncio.create_task(proxy.proxy_asgi_receive(receive, queue))
        waiting = []
        for taker in takers:
            metadata = RequestMetadata(request_id="1", internal_request_id="1")
            metadata.troupe_process = taker  # type: ignore[attr-defined]
            given[:] = await proxy.receive_asgi_messages(metadata)
            waiting.append(asyncio.create_task(proxy.receive_asgi_messages(metadata)))  # until the client leaves
            await asyncio.sleep(0)
        status = 200 if given[-1]["type"] == "http.request" else 499
        await Response("ok", status)(scope, receive, send)
        for task in (receiving, *waiting):
            task.cancel()

    return *answer(serve, receive=client), given


def test_a_body_that_a_killed_process_has_taken_along_is_not_waited_for() -> None:
    status, headers, body, given = lost_body(["killed", "next"])
    assert given == [{"type": "http.disconnect"}]
    assert (status, headers["content-type"], headers["retry-after"]) == (503, "application/json", "2")
    assert json.loads(body)["error"]["code"] == "unavailable"


def test_a_body_goes_to_the_process_that_asks_for_it() -> None:
    status, _, body, given = lost_body(["one"])
    assert given == [{"type": "http.request", "body": b"{}", "more_body": False}]
    assert (status, body) == (200, b"ok")
