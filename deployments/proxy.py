"""What Ray Serve's proxy runs around every request: OpenAI errors for a path that no application has, and
for an application that cannot answer.

Ray Serve reads `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` in each proxy; `deployments.cli.own_ray` sets it. HAProxy,
in the fast mode, answers such a path itself, with Ray's text.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.core.errors import RouteNotFound, TroupeError, Unavailable
from deployments.openai.http.errors import error_body, error_headers

_RETRY_S = 5
_NO_APPLICATION = (b"Path '", b"/-/routes")


def middlewares() -> list[Middleware]:
    """Called by Ray Serve."""
    return [Middleware(OpenAINotFound)]


class OpenAINotFound:
    """ASGI middleware that gives Serve's own errors the shape of OpenAI's: an unknown path, and nobody to answer.

    Doubled slashes before the `route_prefix` are ignored, like those after it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Serve looks for the application before any application sees the path.
        scope = {**scope, "path": "/" + scope["path"].lstrip("/")}
        held: Message | None = None

        async def send_shaped(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and _is_plain_error(message):
                held = message
                return
            if held is not None:
                start, held = held, None
                message = _shaped(start, message, scope)
                await send(start)
            await send(message)

        await self._app(scope, receive, send_shaped)


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
        retry_after=_RETRY_S,
    )


def _with_body(start: Message, message: Message, error: TroupeError) -> Message:
    body = error_body(error)
    headers = MutableHeaders(raw=list(start["headers"]))
    headers["content-type"] = "application/json"
    headers["content-length"] = str(len(body))
    for name, value in error_headers(error).items():
        headers[name] = value
    start["headers"] = headers.raw
    return {**message, "body": body}
