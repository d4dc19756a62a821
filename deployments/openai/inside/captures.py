"""GET, HEAD and DELETE /v1/captures/{id}: the files of captured states, for the key that made them."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import Any, Literal

from fastapi import Response
from fastapi.responses import StreamingResponse
from typing_extensions import TypedDict

from deployments.core.client import CaptureClient
from deployments.core.errors import CaptureNotFound
from deployments.openai.fields.inside import CaptureHandle
from deployments.openai.http.cancel import until_disconnect
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_response

MEDIA_TYPE = "application/vnd.safetensors"
_PIECE = 3 << 20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")  # no file is as long as a number of 19 digits


class CaptureList(TypedDict):
    object: Literal["list"]
    data: list[CaptureHandle]


async def list_captures(exchange: Exchange) -> Response:
    """The captures of this API key."""
    handles = await exchange.models.captures.handles(exchange.owner)
    return json_response({"object": "list", "data": handles})


async def retrieve_capture(exchange: Exchange) -> Response:
    """The file of a capture, in the format of safetensors; a part of it with the header Range."""
    handle = await _info(exchange)
    size = int(handle["bytes"])
    headers = {"etag": f'"{handle["id"]}"', "accept-ranges": "bytes"}
    asked = exchange.request.headers.get("range")
    start, end = 0, size
    if asked is not None and (span := _span(asked, size)) is not None:
        start, end = span
        if start >= end:
            headers["content-range"] = f"bytes */{size}"
            return Response(status_code=416, headers=headers)
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    status = 206 if "content-range" in headers else 200
    if exchange.request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=MEDIA_TYPE)
    pieces = _pieces(exchange.models.captures, _asked(exchange), exchange.owner, start, end)
    return StreamingResponse(pieces, status_code=status, headers=headers, media_type=MEDIA_TYPE)


async def delete_capture(exchange: Exchange) -> Response:
    """Delete a capture now."""
    if not await exchange.models.captures.delete(_asked(exchange), exchange.owner):
        raise _not_found(_asked(exchange))
    return Response(status_code=204)


async def _info(exchange: Exchange) -> dict[str, Any]:
    asked = exchange.models.captures.info(_asked(exchange), exchange.owner)
    handle = await until_disconnect(exchange.request.receive, asked)
    if handle is None:
        raise _not_found(_asked(exchange))
    return handle


async def _pieces(
    captures: CaptureClient, capture_id: str, owner: str, start: int, end: int
) -> AsyncGenerator[bytes, None]:
    while start < end:
        piece = await captures.piece(capture_id, owner, start, min(_PIECE, end - start))
        if not piece:  # Deleted meanwhile: the client sees that the body is too short.
            return
        start += len(piece)
        yield piece


def _span(asked: str, size: int) -> tuple[int, int] | None:
    """The bytes of a Range header, RFC 9110, 14.2; None if it is not one range of bytes."""
    match = _RANGE.fullmatch(asked.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size


def _asked(exchange: Exchange) -> str:
    return str(exchange.request.path_params["capture"])


def _not_found(capture_id: str) -> CaptureNotFound:
    return CaptureNotFound(
        f"This API key has no capture {capture_id[:100]!r}; it may have expired, or its replica has gone."
    )
