"""Answers that take a while: the status is sent with their first bytes, and never before an error could decide it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from deployments.core.calls import LARGE
from deployments.core.collector import without_collector
from deployments.core.errors import TroupeError
from deployments.core.json_text.writer import JsonWriter
from deployments.openai.http.cancel import Disconnected, until_disconnect
from deployments.openai.http.errors import error_body, error_body_for, internal_error
from deployments.openai.http.exchange import Exchange

logger = logging.getLogger(__name__)

T = TypeVar("T")
Chunks = AsyncGenerator[bytes, None]

DONE = b"data: [DONE]\n\n"


# Line ends to `str.splitlines`, by which some clients split a stream, that JSON leaves as they are.
_WRITER = JsonWriter()
_LINE_ENDS = [(end.encode(), f"\\u{ord(end):04x}".encode()) for end in "\x85\u2028\u2029"]


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON, written in pieces for a request that is large."""
    return _WRITER.data(value) if LARGE.get() else _WRITER.small(value)


def sse(value: Any, event: str | None = None) -> bytes:
    """A server-sent event; its data is one line, whatever a client takes for the end of one."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + _one_line(to_json(value)) + b"\n\n"


def _one_line(data: bytes) -> bytes:
    for raw, escaped in _LINE_ENDS:
        data = data.replace(raw, escaped)
    return data


def json_response(value: Any) -> Response:
    """A response that is computed at once."""
    return Response(to_json(value), media_type="application/json")


async def build(part: Callable[[], T], *, large: bool) -> T:
    """A part of an answer, built in a thread and in pieces if it is megabytes, so that other requests go on."""
    if not large and not LARGE.get():
        return part()
    LARGE.set(True)
    return await asyncio.to_thread(without_collector, part)


async def written(value: Any) -> bytes:
    """`to_json`; in a thread if the value is large."""
    return await build(lambda: to_json(value), large=not _WRITER.is_small(value))


async def json_answer(exchange: Exchange, answer: Coroutine[Any, Any, bytes]) -> Response:
    """A response whose body may take a while to compute."""
    if not exchange.options.heartbeat_seconds or exchange.request.scope["state"].get("in_batch"):
        return await text_answer(exchange, answer, "application/json")
    on_error = partial(error_body_for, exchange.request.scope)
    return await _respond(exchange, _once(answer), "application/json", beat=b"\n", on_error=on_error)


async def text_answer(exchange: Exchange, answer: Coroutine[Any, Any, bytes], media_type: str) -> Response:
    """A response in one piece, which no heartbeat comes before."""
    return Response(await until_disconnect(exchange.request.receive, answer), media_type=media_type)


async def sse_answer(
    exchange: Exchange, chunks: Chunks, on_error: Callable[[TroupeError], bytes] | None = None
) -> Response:
    """A stream of server-sent events.

    Args:
        chunks: the events, `DONE` included where the route has one.
        on_error: the last events of a stream that fails; by default the error and `DONE`.
    """
    response = await _respond(
        exchange, chunks, "text/event-stream", beat=b": working\n\n", on_error=on_error or sse_error
    )
    response.headers["cache-control"] = "no-cache"
    response.headers["x-accel-buffering"] = "no"
    return response


def sse_error(error: TroupeError) -> bytes:
    """An error as the last event of a stream."""
    return b"data: " + error_body(error) + b"\n\n" + DONE


async def _once(answer: Coroutine[Any, Any, bytes]) -> Chunks:
    yield await answer


async def _respond(
    exchange: Exchange, chunks: Chunks, media_type: str, *, beat: bytes, on_error: Callable[[TroupeError], bytes]
) -> Response:
    """The response that `chunks` will fill, once the first of them is there: an error before it has its own status."""
    if exchange.options.heartbeat_seconds:
        chunks = with_heartbeat(chunks, exchange.options.heartbeat_seconds, beat)
    try:
        first = await until_disconnect(exchange.request.receive, anext(chunks))
    except BaseException:
        await chunks.aclose()
        raise
    return LongResponse(first, chunks, media_type, exchange.request_id, lambda error: on_error(exchange.as_sent(error)))


async def with_heartbeat(chunks: Chunks, seconds: float, beat: bytes) -> Chunks:
    """`chunks`, and a `beat` whenever no chunk came for `seconds` seconds."""
    waiting: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(chunks, None))
            done, _ = await asyncio.wait((waiting,), timeout=seconds)
            if not done:
                yield beat
                continue
            chunk, waiting = waiting.result(), None
            if chunk is None:
                return
            yield chunk
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait((waiting,))
        await chunks.aclose()


class LongResponse(Response):
    """A body sent in pieces. The client's leaving closes `rest`; a failure of `rest` becomes the body's last piece."""

    def __init__(
        self, first: bytes, rest: Chunks, media_type: str, request_id: str, on_error: Callable[[TroupeError], bytes]
    ) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._request_id = request_id
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except (Disconnected, OSError):
            logger.info("The client of request %s has left", self._request_id)
        finally:
            await self._rest.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for chunk in self._rest:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TroupeError as error:
            await send({"type": "http.response.body", "body": self._on_error(error), "more_body": True})
        except OSError:
            raise
        except Exception as error:
            logger.exception("Request %s failed while its answer was sent", self._request_id)
            body = self._on_error(internal_error(error))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
