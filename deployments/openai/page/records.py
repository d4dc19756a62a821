"""GET /records and /records/{record}: the calls that `api.record_dir` keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from fastapi import Response
from typing_extensions import TypedDict

from deployments.core.errors import BadRequest, RecordNotFound
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import to_json
from deployments.openai.page.record_files import RecordFolder, RecordQuery

_MOST = 200
# A scan of large files keeps a thread for a while: these are not those of other requests.
_READERS = ThreadPoolExecutor(2, thread_name_prefix="record-reader")


class RecordList(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]
    next: str | None


async def list_records(exchange: Exchange) -> Response:
    """Recorded calls, the newest first; of one model, or with a text anywhere in their line."""
    folder = _folder(exchange)
    given = exchange.request.query_params
    query = RecordQuery(model=given.get("model", ""), text=given.get("q", ""))
    limit = _limit(given.get("limit", "50"))

    def read() -> bytes:
        calls, after = folder.calls(query, limit, given.get("after", ""))
        shape: RecordList = {"object": "list", "data": calls, "next": after}
        return to_json(shape)

    return await _answer(read)


async def retrieve_record(exchange: Exchange) -> Response:
    """One recorded call, as it was written."""
    folder, record = _folder(exchange), exchange.request.path_params["record"]
    return await _answer(lambda: folder.line(record))


async def _answer(read: Callable[[], bytes]) -> Response:
    content = await asyncio.get_running_loop().run_in_executor(_READERS, read)
    return Response(content, media_type="application/json")


def _folder(exchange: Exchange) -> RecordFolder:
    exchange.api.keys.check_record(exchange.request.headers)
    if exchange.options.record_dir is None:
        raise RecordNotFound("Calls are not recorded; set api.record_dir to a folder in the configuration.")
    return RecordFolder(Path(exchange.options.record_dir))


def _limit(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= _MOST:
        raise BadRequest(
            f"Invalid 'limit': it should be a number from 1 to {_MOST}; got {text[:100]!r}.", param="limit"
        )
    return int(text)
