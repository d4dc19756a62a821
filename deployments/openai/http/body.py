"""Reading a request's JSON body: limits first, then nothing that later code could stumble over."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

from fastapi import Request

from deployments.config.api import ApiOptions
from deployments.core.errors import BadRequest, BodyTimeout, TooLarge, UnsupportedMediaType

MAX_DEPTH = 100
_OFF_LOOP_BYTES = 256 * 1024
_NOT_ZERO = re.compile(r"-?[0.]*[1-9]")


async def read_json(request: Request, options: ApiOptions) -> dict[str, Any]:
    """The body's JSON object.

    Raises:
        BodyTimeout: the body has stopped coming.
        TooLarge: it is larger than `max_body_bytes`.
        UnsupportedMediaType: it is declared to be something else than JSON.
        BadRequest: it is not a JSON object in UTF-8, is nested too deeply, or has NaN or half a surrogate pair in it.
    """
    _check_type(request.headers.get("content-type"))
    raw = await read_bytes(request, options)
    if len(raw) > _OFF_LOOP_BYTES:
        return await asyncio.to_thread(parse_object, raw)
    return parse_object(raw)


async def read_bytes(request: Request, options: ApiOptions) -> bytes:
    """The whole body, refused as soon as it proves too large, or does not come on."""
    max_bytes, patience = options.max_body_bytes, options.body_timeout_s
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    chunks = bytearray()
    stream = request.stream()
    while True:
        try:
            chunks += await asyncio.wait_for(anext(stream), patience)
        except StopAsyncIteration:
            return bytes(chunks)
        except TimeoutError:
            raise BodyTimeout(
                f"The request's body has stopped after {len(chunks)} bytes; this server waits {patience:g} s for more "
                "(body_timeout_s)."
            ) from None
        if len(chunks) > max_bytes:
            raise _too_large(max_bytes)


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object that can be written as UTF-8 JSON again."""
    if not raw.strip():
        raise _malformed("the body is empty")
    try:
        body = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise _malformed(str(error)) from error
    if not isinstance(body, dict):
        raise _malformed(f"it is {_kind(body)}; send an object")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(body)
    if b"\\ud" in raw or b"\\uD" in raw:
        _check_surrogates(body)
    return body


def _check_type(content_type: str | None) -> None:
    if content_type is None:
        return
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaType(
            f"This route reads JSON, not {kind[:100] or 'an empty content type'!r}; "
            "send the header Content-Type: application/json."
        )


def _check_depth(body: object) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _check_surrogates(body: object) -> None:
    try:
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _malformed("it has half of a surrogate pair in a string, which is no Unicode text") from error


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON value")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value) or (value == 0 and _NOT_ZERO.match(digits)):
        raise ValueError(f"the number {digits[:40]} is out of range")
    return value


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"The request body is larger than the {max_bytes} bytes this server reads (max_body_bytes).")


def _too_deep() -> BadRequest:
    return BadRequest(f"The body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")


def _malformed(why: str) -> BadRequest:
    return BadRequest(f"The body is not a valid JSON object: {why}.", code="invalid_json")


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null")
