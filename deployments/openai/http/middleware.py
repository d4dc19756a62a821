"""The outermost layer of the API: paths, request ids, header limits, keys, an OpenAI error for what gets this far."""

from __future__ import annotations

import logging
import re
import time
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

from fastapi import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.config.api import ApiOptions
from deployments.core.errors import HeadersTooLarge, TroupeError, Unauthorized
from deployments.openai.fields.fields import REQUEST_ID
from deployments.openai.http.errors import error_response, internal_error
from deployments.openai.http.keys import ApiKeys
from deployments.openai.http.paths import TidyPaths, route_path

logger = logging.getLogger(__name__)

ACCESS = logging.getLogger("troupe.access")
"""One line for each request. Off until somebody sets its level: servers around this one have access logs too."""
ACCESS.setLevel(logging.WARNING)

OPEN_PATHS = ("/health", "/v1/health")
PAGES = ("/docs", "/openapi.json")
_REQUEST_ID = re.compile(REQUEST_ID)
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class RequestMiddleware:
    """ASGI middleware around every route.

    Args:
        names_requests: put the request's id into the response; off if a server around it does.
    """

    def __init__(
        self, app: ASGIApp, options: ApiOptions, keys: ApiKeys, paths: TidyPaths, *, names_requests: bool = True
    ) -> None:
        self._app = app
        self._options = options
        self._keys = keys
        self._paths = paths
        self._names_requests = names_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = self._paths.scope(scope)
        state = scope.setdefault("state", {})
        self._name(state, Headers(scope=scope).get("x-request-id"))
        began, status, complete = time.monotonic(), 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._names_requests:
                    MutableHeaders(scope=message)["x-request-id"] = state["request_id"]
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        state["at_end"] = at_end = ExitStack()
        try:
            refusal = self._refusal(scope)
            await (refusal or self._app)(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("Request %s to %s failed", state["request_id"], scope["path"])
            if status:
                raise
            await error_response(internal_error(error), scope)(scope, receive, send_with_id)
        finally:
            at_end.close()
            if ACCESS.isEnabledFor(logging.INFO):
                _log_access(scope, status if complete else 499, time.monotonic() - began)

    def _refusal(self, scope: Scope) -> Response | None:
        try:
            self._check_headers(scope)
            headers, state = Headers(scope=scope), scope["state"]
            # A line of a batch has the owner of the batch: its key was checked when the batch was made.
            if "owner" not in state and route_path(scope) not in OPEN_PATHS:
                self._keys.check(headers)
            state.setdefault("owner", self._keys.owner(headers))
        except TroupeError as error:
            response = error_response(error, scope)
            if isinstance(error, Unauthorized):
                # A browser asks for a password, and sends it with every request to this server.
                page = route_path(scope) in PAGES
                response.headers["www-authenticate"] = 'Basic realm="API key"' if page else "Bearer"
            return response
        return None

    def _check_headers(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        limit = self._options.max_header_bytes
        if size > limit:
            raise HeadersTooLarge(
                f"The request headers have {size} bytes; this server reads {limit} (max_header_bytes)."
            )

    def _name(self, state: dict[str, Any], given: str | None) -> None:
        """Set `request_id`, the client's own or a new one, and `request_id_is_new`, for the routes."""
        usable = given is not None and _REQUEST_ID.fullmatch(given) is not None
        state["request_id"] = given if usable else f"req_{uuid4().hex}"
        # Ray Serve sends a UUID of its own if the client sends no id: then the request's field decides.
        made = not self._names_requests and usable and _UUID.fullmatch(given or "") is not None
        state["request_id_is_new"] = made or not usable


def _log_access(scope: Scope, status: int, seconds: float) -> None:
    """Log a request that has ended; 499 if its client did not stay for all of the answer."""
    path = route_path(scope)
    if path in OPEN_PATHS:  # asked every few seconds
        return
    state = scope["state"]
    fields = {"request": state["request_id"], "route": f"{scope['method']} {path[:200]!r}", "status": status}
    fields |= {name: state[name] for name in ("model", "error") if state.get(name)}
    if (usage := state.get("usage")) is not None:
        fields |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    fields["seconds"] = round(seconds, 4)
    ACCESS.info(" ".join(f"{name}=%s" for name in fields), *fields.values())
