"""Computes a line of a batch as the request that it is: by the routes of this process, without a connection."""

from __future__ import annotations

import asyncio
import json

from httpx2 import ASGITransport, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.batches.client import LineAnswer, LineCall

PRIORITY = 1_000_000
"""Of lines: a lower number is computed earlier, and 0 is that of live requests."""


class LineComputer:
    """A `Compute` over the routes of an application.

    Attributes:
        app: the application; set before the first line.
    """

    app: ASGIApp

    async def __call__(self, call: LineCall) -> LineAnswer:
        async def asked(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = {"owner": call.owner, "in_batch": True}
            await self.app(scope, receive, send)

        headers = {"content-type": "application/json", "x-request-id": call.request_id}
        content = await asyncio.to_thread(_content, call)  # of megabytes, perhaps
        request = Request("POST", f"http://batch{call.url}", headers=headers, content=content)
        response = await ASGITransport(asked, raise_app_exceptions=False).handle_async_request(request)
        return LineAnswer.of(response.status_code, response.headers, await response.aread())


def _content(call: LineCall) -> bytes:
    return json.dumps({**call.body, "priority": PRIORITY}).encode()
