"""Reading a request's multipart form: fields as JSON would have them, and one file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from deployments.config.api import ApiOptions
from deployments.core.errors import BadRequest, Unavailable, UnsupportedMediaType
from deployments.openai.http.body import body_chunks, read_bytes

_MAX_FIELDS = 100
_MAX_FIELD_BYTES = 1 << 20
_PART = 1 << 18
FILE = "file"


async def read_form(request: Request, options: ApiOptions, lists: frozenset[str]) -> dict[str, Any]:
    """The form's fields; a file is its bytes.

    Args:
        lists: the fields that are lists, each item a field of its own (`name` or `name[]`).

    Raises:
        TooLarge: the body is larger than `max_body_bytes`.
        UnsupportedMediaType: it is declared to be something else than a form.
        BadRequest: it is not a form, or repeats a field that is not a list.
    """
    _check_type(request)
    raw = await read_bytes(request, options)
    # All of it is in memory already, so no part needs a file of its own on the disk.
    form = await _parsed(request, _parts(raw), spool_bytes=options.max_body_bytes)
    try:
        return await _fields(form, lists)
    finally:
        await form.close()


@asynccontextmanager
async def uploaded_form(request: Request, options: ApiOptions) -> AsyncIterator[FormData]:
    """A form whose file is as large as a file of `api.batches`: it is kept in a temporary file, and not in memory.

    Raises:
        TroupeError: see `read_form`.
    """
    _check_type(request)
    limit = int(options.batches.file_mib * 2**20) + _MAX_FIELD_BYTES
    chunks = body_chunks(request, options, limit, "api.batches.file_mib")
    try:
        form = await _parsed(request, chunks, spool_bytes=_MAX_FIELD_BYTES)
    except OSError as error:
        raise Unavailable(f"The file cannot be received: {error.strerror}.", retry_after=60) from error
    try:
        yield form
    finally:
        await form.close()


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise UnsupportedMediaType(
            f"This route reads a form with a file, not {kind[:100] or 'an empty content type'!r}; send it as "
            "multipart/form-data."
        )


async def _parsed(request: Request, chunks: AsyncGenerator[bytes, None], *, spool_bytes: int) -> FormData:
    parser = MultiPartParser(
        request.headers, chunks, max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
    )
    parser.spool_max_size = spool_bytes
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        why = getattr(error, "message", None) or str(error)
        raise BadRequest(f"The body is not a valid form: {why}.", code="invalid_form") from error


async def _parts(raw: bytearray) -> AsyncGenerator[bytes, None]:
    """The body in parts, between which other requests go on."""
    for start in range(0, len(raw), _PART):
        yield bytes(raw[start : start + _PART])
        await asyncio.sleep(0)


async def _fields(form: FormData, lists: frozenset[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        item = await value.read() if isinstance(value, UploadFile) else value
        if isinstance(item, bytes) != (name == FILE):
            expected = "a file" if name == FILE else "a text, not a file"
            raise BadRequest(f"Invalid {name[:100]!r}: input should be {expected}.", param=name[:100])
        if name in lists:
            found.setdefault(name, []).append(item)
        elif name in found:
            raise BadRequest(f"Invalid {name[:100]!r}: it is given twice.", param=name[:100])
        elif item != "":
            found[name] = item
    return found
