"""What comes of a batch's lines: JSON lines in files, on the disk before anybody counts them."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from deployments.batches.client import LineAnswer
from deployments.batches.lines import LineRefused

_ANSWERED = b', "error": null}\n'
_ID = re.compile(rb'\{"id": "batch_req_([0-9a-f]+)_(\d+)"')


def result_line(key: str, number: int, custom_id: str, answer: LineAnswer) -> bytes:
    """A line that was answered.

    Args:
        key: hex digits that all lines of the batch have in their ids.
    """
    # White space between tokens is all that a line end can be: strings have none in JSON.
    body = answer.body.strip().replace(b"\n", b" ").replace(b"\r", b" ") or b"null"
    error = None if answer.status == 200 else _error(answer)
    head = f'{_head(key, number, custom_id)}, "response": {{"status_code": {answer.status}, '
    head += f'"request_id": "{request_id(key, number)}", "body": '
    return head.encode() + body + f'}}, "error": {json.dumps(error)}}}\n'.encode()


def refused_line(key: str, number: int, refused: LineRefused) -> bytes:
    """A line that was not sent."""
    error = json.dumps({"code": refused.code, "message": refused.message})
    return f'{_head(key, number, refused.custom_id)}, "response": null, "error": {error}}}\n'.encode()


def request_id(key: str, number: int) -> str:
    """The id of a line."""
    return f"batch_req_{key}_{number}"


def _head(key: str, number: int, custom_id: str | None) -> str:
    return f'{{"id": "{request_id(key, number)}", "custom_id": {json.dumps(custom_id)}'


def _error(answer: LineAnswer) -> dict[str, object]:
    if {"code", "message"} <= answer.error.keys():
        return {"code": answer.error["code"], "message": answer.error["message"]}
    return {"code": "invalid_response", "message": f"The server has answered with status {answer.status}."}


class ResultFile:
    """Appends lines to a file.

    Args:
        path: made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def recover(self, key: str) -> Iterator[tuple[int, bool]]:
        """The numbers of the lines that the file has, and whether each failed. A line that is cut short is removed.
        Blocks.

        Raises:
            OSError: the file cannot be read or written.
            ValueError: it has lines of another batch.
        """
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                found = _ID.match(line)
                if found is None or found[1].decode() != key:
                    raise ValueError(f"{self.path} has lines of another input file")
                yield int(found[2]), not line.endswith(_ANSWERED)
                end += len(line)
            file.truncate(end)
            os.fsync(file.fileno())

    def leave_out_failed(self) -> None:
        """Remove the lines that failed. Blocks.

        Raises:
            OSError: the file cannot be read or written.
        """
        kept = self.path.with_name(f"{self.path.name}.kept")
        with self.path.open("rb") as file, open(kept, "wb", opener=_for_the_owner) as written:
            written.writelines(line for line in file if line.endswith(_ANSWERED))
            written.flush()
            os.fsync(written.fileno())
        kept.replace(self.path)
        sync_folder(self.path.parent)

    def append(self, lines: Sequence[bytes]) -> None:
        """Write all lines or none; they are on the disk when this returns. Blocks.

        Raises:
            OSError: they cannot be written.
        """
        if self._file is None:
            self._file = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            sync_folder(self.path.parent)
        size, data = os.fstat(self._file).st_size, b"".join(lines)
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of files to the disk. Blocks."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
