"""/v1/files: the inputs of batches and their results, for the key that made them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import FormData, UploadFile

from deployments.batches.client import BatchClient, NewFile
from deployments.core.errors import BadRequest, TroupeError
from deployments.openai.batches.listing import asked_page, batches_of, list_response
from deployments.openai.batches.schema import UploadBody
from deployments.openai.fields.fields import parse_fields
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.form import FILE, uploaded_form
from deployments.openai.http.streaming import json_response

_PIECE = 2 << 20


async def upload_file(exchange: Exchange) -> Response:
    """Upload a file of JSON lines, the input of a batch."""
    batches = batches_of(exchange)
    async with uploaded_form(exchange.request, exchange.options) as form:
        body, unknown = parse_fields(UploadBody, _fields(form))
        exchange.ignore(unknown)
        file = form[FILE]
        assert isinstance(file, UploadFile)
        expires = None if body.expires_after is None else body.expires_after.seconds
        new = NewFile(filename=file.filename or FILE, purpose=body.purpose, expires_after=expires)
        return json_response(await _kept(batches, exchange.owner, file, new))


def _fields(form: FormData) -> dict[str, Any]:
    """The fields as JSON would have them; the file stays where it is."""
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) != (name == FILE):
            expected = "a file" if name == FILE else "a text, not a file"
            raise BadRequest(f"Invalid {name[:100]!r}: input should be {expected}.", param=name[:100])
        fields[name] = value if isinstance(value, str) else b""
    expiry = {key: fields.pop(f"expires_after[{key}]", None) for key in ("anchor", "seconds")}
    if any(expiry.values()):
        seconds = expiry["seconds"] or ""
        number = int(seconds) if seconds.isdecimal() and len(seconds) <= 9 else expiry["seconds"]
        fields["expires_after"] = {**expiry, "seconds": number}
    return fields


async def _kept(batches: BatchClient, owner: str, file: UploadFile, new: NewFile) -> Mapping[str, Any]:
    upload = await batches.begin_upload()
    try:
        while piece := await file.read(_PIECE):
            await batches.add_to_upload(upload, piece)
        return await batches.end_upload(upload, owner, new)
    except BaseException:
        with contextlib.suppress(TroupeError):
            await batches.drop_upload(upload)
        raise


async def list_files(exchange: Exchange) -> Response:
    """The files of this API key."""
    batches = batches_of(exchange)
    page = await asked_page(exchange, batches.file, default=10_000, most=10_000, keys=("purpose",))
    return list_response(*await batches.files(exchange.owner, page))


async def retrieve_file(exchange: Exchange) -> Response:
    """A file, without its content."""
    return json_response(await batches_of(exchange).file(_asked(exchange), exchange.owner))


async def file_content(exchange: Exchange) -> Response:
    """The content of a file."""
    batches, file_id = batches_of(exchange), _asked(exchange)
    size = (await batches.file(file_id, exchange.owner))["bytes"]
    headers = {"content-length": str(size)}
    if exchange.request.method == "HEAD":
        return Response(headers=headers, media_type="application/octet-stream")
    pieces = _pieces(batches, file_id, exchange.owner, size)
    return StreamingResponse(pieces, headers=headers, media_type="application/octet-stream")


async def _pieces(batches: BatchClient, file_id: str, owner: str, size: int) -> AsyncGenerator[bytes, None]:
    sent = 0
    while sent < size:
        piece = await batches.file_piece(file_id, owner, sent, min(_PIECE, size - sent))
        if not piece:  # Deleted meanwhile: the client sees that the body is too short.
            return
        sent += len(piece)
        yield piece


async def delete_file(exchange: Exchange) -> Response:
    """Delete a file. A batch that reads it goes on."""
    file_id = _asked(exchange)
    await batches_of(exchange).delete_file(file_id, exchange.owner)
    return json_response({"id": file_id, "object": "file", "deleted": True})


def _asked(exchange: Exchange) -> str:
    return str(exchange.request.path_params["file_id"])
