"""What runs around every request in Ray Serve's HTTP proxy: OpenAI errors for a path that no application has, and for
an application that cannot answer.

Ray Serve reads `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` in each proxy; `deployments.cli.own_ray` sets it. Where
somebody else has started Ray, `shape_running_proxies` reaches those that run. HAProxy, in the fast mode, answers such a
path itself, with Ray's text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.core.errors import RouteNotFound, TroupeError, Unavailable
from deployments.openai.http.errors import error_body, error_headers
from deployments.openai.http.streaming import sse_error
from deployments.ray_internals import destination, in_running_proxies, wrap_http_proxy
from deployments.readiness import RETRY_S, Waiting

logger = logging.getLogger("ray.serve")

_SERVES_OWN = "/-/"
_NO_APPLICATION = (b"Path '", b"/-/routes")
_LOST = Unavailable("The server's process that had this request was lost. Try again.", retry_after=2)

_PATIENCE_S = 30.0
"""How long Serve may keep a request that no replica has taken before its controller is asked why."""

Destination = Callable[[str], tuple[str, str, bool] | None]


def middlewares() -> list[Middleware]:
    """Called by Ray Serve in each proxy, before it listens."""
    shape_errors()
    return []


def shape_running_proxies() -> None:
    """Let the proxies that run now give OpenAI's errors; one that Serve starts later has Serve's own."""
    in_running_proxies(shape_errors)


def shape_errors(proxy: Any = None) -> None:
    """Give the errors of this process's proxy the shape of OpenAI's."""
    waiting = Waiting()
    wrap_http_proxy(lambda app, proxy: OpenAIErrors(app, lambda path: destination(proxy, path), waiting))


class OpenAIErrors:
    """ASGI middleware that gives Serve's own errors the shape of OpenAI's: an unknown path, and nobody to answer.

    Doubled slashes before the `route_prefix` are ignored, like those after it.

    Serve lets a request wait for a replica for ever. Here it waits for the next one, but no longer than `patience` if
    the controller knows none then, or does not answer.

    Args:
        destination: the application and the deployment that a path goes to, and whether a replica of it has ever run;
            None if there is no application.
        patience: seconds.
    """

    def __init__(self, app: ASGIApp, destination: Destination, waiting: Waiting, patience: float = _PATIENCE_S) -> None:
        self._app = app
        self._destination = destination
        self._waiting = waiting
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Serve looks for the application before any application sees the path.
        scope = {**scope, "path": "/" + scope["path"].lstrip("/")}
        answer = _Answer(scope, send)
        if scope["path"].startswith(_SERVES_OWN):
            await self._run(scope, receive, answer)
            return
        destination = self._destination(scope["path"])
        if (error := await self._waits(destination)) is not None:
            await answer.give(error)
        elif destination is None:
            await self._run(scope, receive, answer)
        else:
            await self._run_patiently(scope, receive, answer, destination[:2])

    async def _run(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        await self._app(scope, _Receive(receive, answer), answer.send)
        await answer.end()

    async def _waits(self, destination: tuple[str, str, bool] | None) -> Unavailable | None:
        if destination is None:
            return await self._waiting.deploying()
        app, deployment, seen = destination
        return None if seen else await self._waiting.error(app, deployment)

    async def _run_patiently(self, scope: Scope, receive: Receive, answer: _Answer, waits_for: tuple[str, str]) -> None:
        """Run the request; end it with an error while no replica takes it and Serve has none."""
        answer.wait = wait = _Wait(lambda: self._waiting.error(*waits_for), self._patience)
        try:
            await self._run(scope, receive, answer)
        except asyncio.CancelledError:
            if wait.error is None:
                raise
            await answer.end()
        finally:
            wait.end()


class _Wait:
    """Cancels the task of a request that no replica takes, once it has waited long and there is a reason.

    Args:
        why: why there is no replica; None if there is one.
        patience: seconds until that is asked, and between the questions.

    Attributes:
        error: the reason, if the task was canceled.
    """

    def __init__(self, why: Callable[[], Awaitable[Unavailable | None]], patience: float) -> None:
        self.error: Unavailable | None = None
        self._why = why
        self._patience = patience
        self._running = asyncio.current_task()
        self._asking: asyncio.Task[None] | None = None
        self._ended = False
        self._begin()

    def end(self) -> None:
        """A replica has the request, or it has ended."""
        self._ended = True
        self._timer.cancel()

    def _begin(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._patience, self._start_asking)

    def _start_asking(self) -> None:
        self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        error = await self._why()
        if self._ended or self._running is None:
            return
        if error is None:
            self._begin()
        else:
            self.error = error
            self._running.cancel()


class _Receive:
    """What comes from one client."""

    def __init__(self, receive: Receive, answer: _Answer) -> None:
        self._receive = receive
        self._answer = answer

    async def __call__(self) -> Message:
        return await self._receive()

    def take(self) -> None:
        """A replica asks for the body: it has the request."""
        self._answer.take()

    def lose(self) -> None:
        """What has come is lost with the process that has taken it: an error answers it."""
        self._answer.lost = True


class _Answer:
    """What goes out to one client.

    Attributes:
        lost: the request's body was lost; an error that comes of that is not passed on.
        wait: for a replica; nothing of Serve's is passed on once it has ended with an error.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._held: Message | None = None
        self._dropped = False
        self.lost = False
        self.wait: _Wait | None = None
        self._started = self._ended = self._streams = False

    def take(self) -> None:
        """A replica has the request."""
        if self.wait is not None:
            self.wait.end()

    @property
    def _error(self) -> Unavailable | None:
        waited = None if self.wait is None else self.wait.error
        return _LOST if self.lost else waited

    async def send(self, message: Message) -> None:
        """Pass a message of Serve's on, in OpenAI's shape if it is an error of Serve's own."""
        if self._error is not None and message["type"] == "http.response.start" and message["status"] >= 400:
            self._dropped = True
        if self._dropped:
            return
        if message["type"] == "http.response.start" and _is_plain_error(message):
            self._held = message
            return
        if self._held is not None:
            start, self._held = self._held, None
            message = _shaped(start, message, self._scope)
            await self._pass(start)
        await self._pass(message)

    async def give(self, error: TroupeError) -> None:
        """Answer with an error."""
        start: Message = {"type": "http.response.start", "status": error.status, "headers": []}
        body = _with_body(start, {"type": "http.response.body"}, error)
        await self._pass(start)
        await self._pass(body)

    async def end(self) -> None:
        """Say so if the answer has no end: its process was killed."""
        if not self._started:
            await self.give(self._error or _LOST)
        elif not self._ended and self._streams:
            await self._send({"type": "http.response.body", "body": sse_error(_LOST)})

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self.take()
            self._streams = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)


def _is_plain_error(start: Message) -> bool:
    return start["status"] in (404, 503) and Headers(raw=start["headers"]).get("content-type", "").startswith(
        "text/plain"
    )


def _shaped(start: Message, message: Message, scope: Scope) -> Message:
    """The body of an OpenAI error in place of Serve's text; `start` gets its headers. Other answers stay."""
    text = message.get("body", b"")
    if start["status"] == 503:
        return _with_body(start, message, _not_ready(text.decode("utf-8", "replace")))
    if not (text.startswith(_NO_APPLICATION[0]) and _NO_APPLICATION[1] in text):
        return message
    path = str(scope["path"])[:200]
    error = RouteNotFound(f"No application is served at {path}; see /-/routes for their route_prefix.")
    return _with_body(start, message, error)


def _not_ready(why: str) -> Unavailable:
    lines = [line.strip() for line in why.splitlines() if line.strip()]
    return Unavailable(
        f"The application has no replica that answers: {lines[-1][:300] if lines else 'no reason is known'} "
        "`serve status` and the server's log say what it waits for. Try again.",
        retry_after=RETRY_S,
    )


def _with_body(start: Message, message: Message, error: TroupeError) -> Message:
    body = error_body(error)
    headers = MutableHeaders(raw=list(start["headers"]))
    headers["content-type"] = "application/json"
    headers["content-length"] = str(len(body))
    for name, value in error_headers(error).items():
        headers[name] = value
    start["status"] = error.status
    start["headers"] = headers.raw
    return {**message, "body": body}
