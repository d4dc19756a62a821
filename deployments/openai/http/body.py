"""Reading a request's JSON body: limits first, then nothing that later code could stumble over.

Work on large bodies has threads of its own: the event loop goes on with the other requests. One thread has the bodies
of megabytes, one at a time, and one the merely large ones, which do not wait for those.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, Callable
from functools import cache
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from deployments.config.api import ApiOptions
from deployments.core.collector import let_go, without_collector
from deployments.core.errors import BadRequest, BodyTimeout, TooLarge, UnsupportedMediaType
from deployments.core.json_text.reader import JsonReader, TooDeep, TooManyKeys, TooManyObjects
from deployments.host.worker import Worker
from deployments.openai.http.cancel import Disconnected

T = TypeVar("T")

LARGE_BYTES = 64 * 1024
_HUGE_BYTES = 1 << 20
MAX_DEPTH = 100
MAX_OBJECTS = 500_000
MAX_KEYS = 300_000
_PART = 1 << 20
_NOT_ZERO = re.compile(r"-?[0.]*[1-9]")


async def aside(size: int, function: Callable[[], T]) -> T:
    """The function's result, or its exception; computed off the event loop if the request has many bytes."""
    if size <= LARGE_BYTES:
        return function()
    return await _worker("huge-bodies" if size > _HUGE_BYTES else "large-bodies").run(
        lambda: without_collector(function)
    )


def forget(values: list[Any]) -> None:
    """Let the JSON values of a large request go in a thread, see `let_go`."""
    _worker("huge-bodies").put(lambda: without_collector(lambda: let_go(values)))


async def read_body(request: Request, options: ApiOptions) -> bytearray:
    """The body of a request that brings JSON; `parse_object` reads it.

    Raises:
        BodyTimeout: the body has stopped coming.
        Disconnected: the client has left before its end.
        TooLarge: it is larger than `max_body_bytes`.
        UnsupportedMediaType: it is declared to be something else than JSON.
    """
    _check_type(request.headers.get("content-type"))
    return await read_bytes(request, options)


async def read_bytes(request: Request, options: ApiOptions) -> bytearray:
    """The whole body, refused as soon as it proves too large, or does not come on."""
    chunks = bytearray()
    async for chunk in body_chunks(request, options, options.max_body_bytes):
        chunks += chunk
    return chunks


async def body_chunks(
    request: Request, options: ApiOptions, max_bytes: int, key: str = "max_body_bytes"
) -> AsyncGenerator[bytes, None]:
    """The body as it comes; see `read_bytes`.

    Args:
        key: of the configuration, which sets `max_bytes`.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes, key)
    size = 0
    stream = request.stream()
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream), options.body_timeout_s)
        except StopAsyncIteration:
            return
        except ClientDisconnect:
            raise Disconnected from None
        except TimeoutError:
            raise BodyTimeout(
                f"The request's body has stopped after {size} bytes; this server waits {options.body_timeout_s:g} s "
                "for more (body_timeout_s)."
            ) from None
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes, key)
        yield chunk


def parse_object(raw: bytes | bytearray) -> dict[str, Any]:
    """A JSON object that can be written as UTF-8 JSON again. A large one is for a thread of its own.

    Raises:
        BadRequest: it is not a JSON object in UTF-8, is nested too deeply, has too many objects in it or keys in one,
            or NaN, or half a surrogate pair.
    """
    if not raw or (len(raw) <= LARGE_BYTES and raw.isspace()):
        raise _malformed("the body is empty")
    try:
        body = _parse_large(raw) if len(raw) > LARGE_BYTES else _parse_small(raw)
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except (RecursionError, TooDeep) as error:
        raise _too_deep() from error
    except TooManyObjects as error:
        raise BadRequest(
            f"The body has more than {MAX_OBJECTS} objects and arrays; send fewer at once.", code="invalid_json"
        ) from error
    except TooManyKeys as error:
        raise BadRequest(
            f"An object in the body has more than {MAX_KEYS} keys; send fewer at once.", code="invalid_json"
        ) from error
    except ValueError as error:
        raise _malformed(str(error)) from error
    if not isinstance(body, dict):
        raise _malformed(f"it is {_kind(body)}; send an object")
    return body


def _parse_small(raw: bytes | bytearray) -> Any:
    body = _DECODER.decode(raw.decode("utf-8-sig"))
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and isinstance(body, dict):
        _check_depth(body)
    if _may_have_surrogates(raw):
        _check_surrogates(body)
    return body


def _parse_large(raw: bytes | bytearray) -> Any:
    return JsonReader(
        raw,
        _DECODER,
        max_depth=MAX_DEPTH,
        max_objects=MAX_OBJECTS,
        max_keys=MAX_KEYS,
        check=_check_surrogates if _may_have_surrogates(raw) else None,
    ).read()


def _may_have_surrogates(raw: bytes | bytearray) -> bool:
    return any(
        raw.find(half, start, start + _PART + len(half)) >= 0
        for half in (b"\\ud", b"\\uD")
        for start in range(0, len(raw), _PART)
    )


@cache
def _worker(name: str) -> Worker:
    return Worker(name)


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
        raise _malformed("a string in it has half of a surrogate pair, which is not Unicode text") from error


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value) or (value == 0 and _NOT_ZERO.match(digits)):
        raise ValueError(f"the number {digits[:40]} is out of range")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def _too_large(max_bytes: int, key: str) -> TooLarge:
    return TooLarge(f"The request body is larger than the {max_bytes} bytes this server reads ({key}).")


def _too_deep() -> BadRequest:
    return BadRequest(f"The body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")


def _malformed(why: str) -> BadRequest:
    return BadRequest(f"The body is not a valid JSON object: {why}.", code="invalid_json")


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null")
