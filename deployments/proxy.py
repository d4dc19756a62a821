"""What runs around every request in Ray Serve's HTTP proxy: OpenAI errors for a path that no application has, and for
an application that cannot answer.

Ray Serve reads `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` in each proxy; `deployments.cli.own_ray` sets it. Where
somebody else has started Ray, `shape_running_proxies` reaches those that run. HAProxy, in the fast mode, answers such a
path itself, with Ray's text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.core.errors import RouteNotFound, TroupeError, Unavailable
from deployments.openai.http.errors import error_body, error_headers
from deployments.openai.http.streaming import sse_error
from deployments.ray_internals import in_running_proxies, unanswered, wrap_http_proxy
from deployments.readiness import RETRY_S, Waiting

logger = logging.getLogger("ray.serve")

_SERVES_OWN = "/-/"
_NO_APPLICATION = (b"Path '", b"/-/routes")
_LOST = Unavailable("The server's process that had this request was lost. Try again.", retry_after=2)

Target = Callable[[str], tuple[str, str] | None]


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
    wrap_http_proxy(lambda app, proxy: OpenAIErrors(app, lambda path: unanswered(proxy, path), waiting))


class OpenAIErrors:
    """ASGI middleware that gives Serve's own errors the shape of OpenAI's: an unknown path, and nobody to answer.

    Doubled slashes before the `route_prefix` are ignored, like those after it.

    Args:
        target: the application and the deployment that a path goes to, if no replica of it has ever run, for which
            Serve would let the request wait; "" and "" if there is none; else None.
    """

    def __init__(self, app: ASGIApp, target: Target, waiting: Waiting) -> None:
        self._app = app
        self._target = target
        self._waiting = waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Serve looks for the application before any application sees the path.
        scope = {**scope, "path": "/" + scope["path"].lstrip("/")}
        answer = _Answer(scope, send)
        if (error := await self._waits(scope["path"])) is not None:
            await answer.give(error)
            return
        await self._app(scope, _Receive(receive, answer), answer.send)
        await answer.end()

    async def _waits(self, path: str) -> Unavailable | None:
        if path.startswith(_SERVES_OWN):
            return None
        target = self._target(path)
        if target is None:
            return None
        return await (self._waiting.error(*target) if any(target) else self._waiting.deploying())


class _Receive:
    """What comes from one client."""

    def __init__(self, receive: Receive, answer: _Answer) -> None:
        self._receive = receive
        self._answer = answer

    async def __call__(self) -> Message:
        return await self._receive()

    def lose(self) -> None:
        """What has come is lost with the process that has taken it: an error answers it."""
        self._answer.lost = True


class _Answer:
    """What goes out to one client.

    Attributes:
        lost: the request's body was lost; an error that comes of that is not passed on.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._held: Message | None = None
        self._dropped = False
        self.lost = False
        self._started = self._ended = self._streams = False

    async def send(self, message: Message) -> None:
        """Pass a message of Serve's on, in OpenAI's shape if it is an error of Serve's own."""
        if self.lost and message["type"] == "http.response.start" and message["status"] >= 400:
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
            await self.give(_LOST)
        elif not self._ended and self._streams:
            await self._send({"type": "http.response.body", "body": sse_error(_LOST)})

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
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
