"""The folder of one server's files and batches, which one process uses at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from deployments.core.errors import Unavailable

_BUSY = (errno.EACCES, errno.EAGAIN)


class Folder:
    """`state_dir/batches`, locked until `close` or the end of the process. Blocks.

    Attributes:
        files: the folder of what clients upload and of results.
        used: bytes of all files.

    Args:
        limit: of `used`.

    Raises:
        Unavailable: it cannot be written, or another process uses it.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.files = path / "files"
        self._limit = limit
        self._lock = -1
        try:
            self.files.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            self._take()
            self.used = sum(file.stat().st_size for file in self.files.iterdir())
        except Unavailable:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise Unavailable(
                f"The server's state_dir cannot be written: {error.strerror}. Set it to a folder that can be written."
            ) from error

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 500, 0).decode(errors="replace")
            if error.errno not in _BUSY:
                raise
            raise Unavailable(
                f"The server's state_dir is used by another server ({_told(holder)}). Give each one of its own.",
                retry_after=5,
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)

    def file(self, file_id: str) -> Path:
        """The path of a file's content."""
        return self.files / file_id

    def take(self, size: int) -> None:
        """Count bytes that are about to be written.

        Raises:
            OSError: there is no room for them.
        """
        if self.used + size > self._limit:
            raise OSError(errno.EDQUOT, "all files together have api.batches.disk_gib; delete files")
        self.used += size

    def give_back(self, size: int) -> None:
        """Count bytes that are no longer there."""
        self.used -= size

    def remove(self, file_id: str) -> None:
        """Remove a file's content, if it is there."""
        with contextlib.suppress(OSError):
            size = self.file(file_id).stat().st_size
            self.file(file_id).unlink()
            self.give_back(size)

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _told(holder: str) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "which starts"
