"""The files that clients upload, and those with the results of batches."""

from __future__ import annotations

import math
import os
import sqlite3
import time
from dataclasses import dataclass, field
from typing import BinaryIO
from uuid import uuid4

from deployments.batches.client import NewFile, Page
from deployments.batches.database import FILES, Database, Document
from deployments.batches.folder import Folder
from deployments.batches.results import sync_folder
from deployments.config.api import BatchOptions
from deployments.core.errors import BadRequest, FileMissing, TooLarge, Unavailable

_PART = ".part"
_FORGOTTEN_S = 600.0
_HEAD = 1 << 16


@dataclass(slots=True)
class Upload:
    """A file that is being sent."""

    file_id: str
    file: BinaryIO
    size: int = 0
    lines: int = 0
    ends_line: bool = True
    last: float = field(default_factory=time.monotonic)


class Files:
    """File objects and their content. For one thread: every method blocks.

    Args:
        folder: where the content is.
        database: has the objects.
    """

    def __init__(self, folder: Folder, database: Database, options: BatchOptions) -> None:
        self._folder = folder
        self._database = database
        self._options = options
        self._uploads: dict[str, Upload] = {}

    def begin(self) -> str:
        """The id of a new upload.

        Raises:
            Unavailable: the disk cannot be written.
        """
        file_id = new_file_id()
        try:
            file = self._folder.file(file_id + _PART).open("wb", buffering=0)
        except OSError as error:
            raise _unwritten(error) from error
        self._uploads[file_id] = Upload(file_id, file)
        return file_id

    def add(self, upload_id: str, data: bytes) -> None:
        """Append bytes to an upload.

        Raises:
            TooLarge: the file has too many bytes or lines, or there is no room for it.
            BadRequest: it is not text.
            Unavailable: the disk cannot be written.
        """
        upload = self._upload(upload_id)
        try:
            self._check(upload, data)
            self._write(upload, data)
        except Exception:
            self.drop(upload_id)
            raise
        upload.last = time.monotonic()

    def end(self, upload_id: str, owner: str, new: NewFile) -> Document:
        """The file object of an upload that is complete.

        Raises:
            Unavailable: the disk cannot be written.
        """
        upload = self._upload(upload_id)
        try:
            os.fsync(upload.file.fileno())
            upload.file.close()
            self._folder.file(upload_id + _PART).rename(self._folder.file(upload_id))
            sync_folder(self._folder.files)
            document = file_object(upload_id, upload.size, new)
            self._database.add(FILES, owner, document)
        except (OSError, sqlite3.Error) as error:
            self.drop(upload_id)
            raise _unwritten(error) from error
        del self._uploads[upload_id]
        return document

    def drop(self, upload_id: str) -> None:
        """Forget an upload."""
        upload = self._uploads.pop(upload_id, None)
        if upload is not None:
            upload.file.close()
            self._folder.remove(upload_id + _PART)
            self._folder.remove(upload_id)

    def get(self, file_id: str, owner: str, param: str = "id") -> Document:
        """A file object.

        Args:
            param: the field or the parameter of the request that names it.

        Raises:
            FileMissing: this owner has none.
        """
        found = self._database.get(FILES, file_id, owner)
        if found is None or _expired(found):
            raise FileMissing(f"No such File object: {file_id[:100]}.", param=param)
        return found

    def page(self, owner: str, page: Page) -> tuple[list[Document], bool]:
        """File objects, and whether there are more."""
        found, more = self._database.page(FILES, owner, page)
        return [each for each in found if not _expired(each)], more

    def piece(self, file_id: str, owner: str, offset: int, size: int) -> bytes:
        """Bytes of a file; see `get`."""
        self.get(file_id, owner)
        with self._folder.file(file_id).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def delete(self, file_id: str, owner: str) -> None:
        """Delete the object of a file; see `get`. `sweep` deletes the content when no batch reads it."""
        self.get(file_id, owner)
        self._database.remove(FILES, file_id)

    def sweep(self, in_use: set[str]) -> None:
        """Delete what has expired, and content that no object has.

        Args:
            in_use: ids of files that batches read or write.
        """
        for upload in list(self._uploads.values()):
            if time.monotonic() - upload.last > _FORGOTTEN_S:
                self.drop(upload.file_id)
        known = set(in_use)
        for _, document in self._database.all(FILES):
            if _expired(document):
                self._database.remove(FILES, document["id"])
            else:
                known.add(document["id"])
        for path in list(self._folder.files.iterdir()):
            if path.name.removesuffix(_PART) not in known | self._uploads.keys():
                self._folder.remove(path.name)

    def _upload(self, upload_id: str) -> Upload:
        if upload_id not in self._uploads:
            raise Unavailable("The upload was lost; send the file again.", retry_after=1)
        return self._uploads[upload_id]

    def _check(self, upload: Upload, data: bytes) -> None:
        options = self._options
        upload.lines += data.count(b"\n") + (0 if data.endswith(b"\n") else 1) - (0 if upload.ends_line else 1)
        upload.ends_line = data.endswith(b"\n")
        if upload.size + len(data) > options.file_mib * 2**20:
            raise _too_large(options)
        if upload.lines > options.file_lines:
            raise TooLarge(
                f"The file has more than the {options.file_lines} lines that this server takes "
                "(api.batches.file_lines); split it.",
                param="file",
            )
        if upload.size < _HEAD and b"\0" in data[:_HEAD]:
            raise BadRequest("Invalid 'file': it is not text; send JSON lines.", param="file", code="invalid_file")

    def _write(self, upload: Upload, data: bytes) -> None:
        try:
            self._folder.take(len(data))
        except OSError:
            raise TooLarge(
                f"The file does not fit: all files together have at most "
                f"{self._options.disk_gib:g} GiB (api.batches.disk_gib). Delete files.",
                param="file",
                code="disk_quota",
            ) from None
        try:
            # A short write is a full disk: the next one says so.
            written = 0
            while written < len(data):
                written += upload.file.write(memoryview(data)[written:])
        except OSError as error:
            # What was not written is not given back with the content.
            self._folder.give_back(len(data) - written)
            raise _unwritten(error) from error
        upload.size += len(data)


def new_file_id() -> str:
    return f"file-{uuid4().hex[:24]}"


def file_object(file_id: str, size: int, new: NewFile) -> Document:
    """A file as OpenAI describes it."""
    now = int(time.time())
    ends = {} if new.expires_after is None else {"expires_at": now + new.expires_after}
    return {
        "id": file_id,
        "object": "file",
        "bytes": size,
        "created_at": now,
        **ends,
        "filename": new.filename,
        "purpose": new.purpose,
        "status": "processed",
    }


def _too_large(options: BatchOptions) -> TooLarge:
    return TooLarge(
        f"The file is larger than the {options.file_mib:g} MiB that this server takes (api.batches.file_mib); "
        "split it.",
        param="file",
    )


def _expired(document: Document) -> bool:
    return bool(document.get("expires_at", math.inf) <= time.time())


def _unwritten(error: OSError | sqlite3.Error) -> Unavailable:
    return Unavailable(f"The file cannot be written: {reason_of(error)}.", retry_after=60)


def reason_of(error: OSError | sqlite3.Error) -> str:
    """Why the disk was not written."""
    return str(getattr(error, "strerror", None) or error)
