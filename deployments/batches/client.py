"""What the routes of files and batches ask of the one process that keeps them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

Ask = Callable[..., Awaitable[Any]]
"""Calls a method of `Batches` by its name, wherever it lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A part of a list.

    Attributes:
        after: id that the part begins after; None begins at the start.
        purpose: of the files; None lists all.
        newest_first: the order by time.
    """

    limit: int
    after: str | None = None
    purpose: str | None = None
    newest_first: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """What a client says of a file that it has sent.

    Attributes:
        expires_after: seconds; None keeps it until it is deleted.
    """

    filename: str
    purpose: str
    expires_after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LineCall:
    """A line of a batch as a request.

    Attributes:
        owner: digest of the API key that the batch belongs to.
        request_id: of the line.
    """

    url: str
    body: Mapping[str, Any]
    owner: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LineAnswer:
    """What a line was answered.

    Attributes:
        body: JSON.
        retry_after: seconds, if the answer says so.
        replica_lost: the process that computed it has ended.
    """

    status: int
    body: bytes
    retry_after: float | None = None
    replica_lost: bool = False

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str], body: bytes) -> Self:
        """As a response has it."""
        retry_after = None
        with contextlib.suppress(KeyError, ValueError):
            retry_after = float(headers["retry-after"])
        return cls(status=status, body=body, retry_after=retry_after, replica_lost="x-troupe-lost" in headers)

    @property
    def error(self) -> dict[str, Any]:
        """The error of the body, as OpenAI writes them; empty if it has none."""
        try:
            found = json.loads(self.body)["error"]
        except (ValueError, KeyError, TypeError):
            return {}
        return found if isinstance(found, dict) else {}


Compute = Callable[[LineCall], Awaitable[LineAnswer]]


class BatchClient:
    """Files and batches. Args named `owner` are digests of API keys: what a key has made is there for it alone.

    Every method raises errors of `deployments.core.errors`, among them Unavailable while nobody answers.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def begin_upload(self) -> str:
        """The id of a new upload."""
        return str(await self._ask("begin_upload"))

    async def add_to_upload(self, upload: str, data: bytes) -> None:
        """Append bytes to an upload."""
        await self._ask("add_to_upload", upload, data)

    async def end_upload(self, upload: str, owner: str, new: NewFile) -> dict[str, Any]:
        """The file object of an upload that is complete. It is on the disk."""
        return cast(dict[str, Any], await self._ask("end_upload", upload, owner, new))

    async def drop_upload(self, upload: str) -> None:
        """Forget an upload."""
        await self._ask("drop_upload", upload)

    async def files(self, owner: str, page: Page) -> tuple[list[dict[str, Any]], bool]:
        """File objects, and whether there are more."""
        return cast(tuple[list[dict[str, Any]], bool], await self._ask("files", owner, page))

    async def file(self, file_id: str, owner: str) -> dict[str, Any]:
        """A file object."""
        return cast(dict[str, Any], await self._ask("file", file_id, owner))

    async def file_piece(self, file_id: str, owner: str, offset: int, size: int) -> bytes:
        """Bytes of a file."""
        return cast(bytes, await self._ask("file_piece", file_id, owner, offset, size))

    async def delete_file(self, file_id: str, owner: str) -> None:
        """Delete a file. A batch that reads it goes on."""
        await self._ask("delete_file", file_id, owner)

    async def create_batch(self, owner: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A new batch. It is on the disk."""
        return cast(dict[str, Any], await self._ask("create_batch", owner, dict(fields)))

    async def batches(self, owner: str, page: Page) -> tuple[list[dict[str, Any]], bool]:
        """Batches, and whether there are more."""
        return cast(tuple[list[dict[str, Any]], bool], await self._ask("batches", owner, page))

    async def batch(self, batch_id: str, owner: str) -> dict[str, Any]:
        """A batch."""
        return cast(dict[str, Any], await self._ask("batch", batch_id, owner))

    async def cancel_batch(self, batch_id: str, owner: str) -> dict[str, Any]:
        """A batch that starts no more lines."""
        return cast(dict[str, Any], await self._ask("cancel_batch", batch_id, owner))
