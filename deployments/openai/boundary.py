"""The outermost layer of the API: request ids, header limits, and an OpenAI error for whatever gets this far."""

from __future__ import annotations

import logging
import re
from uuid import uuid4

from fastapi import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import HeadersTooLarge
from deployments.openai.errors import error_response, internal_error
from deployments.openai.options import ApiOptions

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Boundary:
    """ASGI middleware around every route."""

    def __init__(self, app: ASGIApp, options: ApiOptions) -> None:
        self._app = app
        self._options = options

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
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._options.max_header_bytes:
            limit = self._options.max_header_bytes
            return error_response(
                HeadersTooLarge(f"The request headers have {size} bytes; this server reads {limit} (max_header_bytes).")
            )
        return None


def _request_id(given: str | None) -> str:
    """The client's own id where it is one, else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else f"req_{uuid4().hex}"
