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

from deployments.core.errors import Unavailable
from deployments.proxy import OpenAIErrors, shape_errors
from deployments.readiness import Waiting


class Controller(Waiting):
    """Says in turn why there is no replica, the last for ever; None if there is one."""

    def __init__(self, *says: str | None) -> None:
        super().__init__()
        self.says = list(says)
        self.asked = 0

    async def error(self, app: str, deployment: str) -> Unavailable | None:
        self.asked += 1
        reason = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        return None if reason is None else Unavailable(f"{app} {deployment}: {reason}", retry_after=5)

    async def deploying(self) -> Unavailable | None:
        return None


def answer(
    serve: ASGIApp,
    destination: tuple[str, str, bool] | None = None,
    path: str = "/v1/models",
    receive: Receive | None = None,
    controller: Waiting | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """What a client gets if Serve answers so."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def leave() -> Message:
        return {"type": "http.disconnect"}

    async def ask() -> None:
        app = OpenAIErrors(serve, lambda path: destination, controller or Controller(None), patience=0.01)
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
    starting = Controller("it starts")
    assert answer(ok, ("troupe", "OpenAIIngress", False), "/-/healthz", controller=starting)[::2] == (200, b"success")
    assert answer(ok, ("troupe", "OpenAIIngress", False), controller=starting)[0] == 503
    assert answer(ok, None)[::2] == (200, b"success")


SEEN = ("troupe", "OpenAIIngress", True)


async def waits(scope: Scope, receive: Receive, send: Send) -> None:
    """As Serve does while an application that has run before has no replica."""
    await asyncio.Event().wait()


async def waits_and_says_so(scope: Scope, receive: Receive, send: Send) -> None:
    try:
        await waits(scope, receive, send)
    except asyncio.CancelledError:
        await PlainTextResponse("cancelled", 499)(scope, receive, send)


@pytest.mark.parametrize("serve", [waits, waits_and_says_so])
def test_a_request_that_no_replica_takes_ends_with_the_controllers_reason(serve: ASGIApp) -> None:
    controller = Controller(None, None, "it does not answer")
    status, headers, body = answer(serve, SEEN, controller=controller)
    assert (status, headers["retry-after"]) == (503, "5")
    assert json.loads(body)["error"]["message"] == "troupe OpenAIIngress: it does not answer"
    assert controller.asked == 3


@pytest.mark.parametrize("has", ["the body", "the answer's start"])
def test_a_request_that_a_replica_has_may_take_its_time(has: str) -> None:
    controller = Controller("it does not answer")

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if has == "the body":
            receive.take()  # type: ignore[attr-defined]  # as the proxy does, once a process asks for the body
            await asyncio.sleep(0.1)
            await PlainTextResponse("ok")(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": b"ok"})

    assert answer(serve, SEEN, controller=controller)[::2] == (200, b"ok")
    assert controller.asked == 0


def test_a_client_that_leaves_while_it_waits_is_none_of_the_controllers() -> None:
    async def leave() -> None:
        app = OpenAIErrors(waits, lambda path: SEEN, Controller("it does not answer"), patience=30)
        request = asyncio.create_task(app({"type": "http", "path": "/", "headers": []}, never, send))
        await asyncio.sleep(0)
        request.cancel()
        await request

    async def never() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(leave())


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
