"""The outermost layer of the API: request ids, header limits, keys, and an OpenAI error for whatever gets this far."""

from __future__ import annotations

import logging
import re
from uuid import uuid4

from fastapi import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import HeadersTooLarge, TroupeError, Unauthorized
from deployments.openai.errors import error_response, internal_error
from deployments.openai.keys import ApiKeys
from deployments.openai.options import ApiOptions

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/v1/health")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Boundary:
    """ASGI middleware around every route.

    Args:
        names_requests: put the request's id into the response; off where a server around it does.
    """

    def __init__(self, app: ASGIApp, options: ApiOptions, keys: ApiKeys, *, names_requests: bool = True) -> None:
        self._app = app
        self._options = options
        self._keys = keys
        self._names_requests = names_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._names_requests:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            refusal = self._refusal(scope)
            await (refusal or self._app)(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("Request %s to %s failed", request_id, scope["path"])
            if started:
                raise
            await error_response(internal_error(error))(scope, receive, send_with_id)

    def _refusal(self, scope: Scope) -> Response | None:
        try:
            self._check_headers(scope)
            if route_path(scope) not in OPEN_PATHS:
                self._keys.check(Headers(scope=scope))
        except TroupeError as error:
            response = error_response(error)
            if isinstance(error, Unauthorized):
                response.headers["www-authenticate"] = "Bearer"
            return response
        return None

    def _check_headers(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        limit = self._options.max_header_bytes
        if size > limit:
            raise HeadersTooLarge(
                f"The request headers have {size} bytes; this server reads {limit} (max_header_bytes)."
            )


def route_path(scope: Scope) -> str:
    """The path that the routes see, whatever prefix the application is served under."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _request_id(given: str | None) -> str:
    """The client's own id where it is one, else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else f"req_{uuid4().hex}"
