"""The files of captured states of one process: a thread writes and removes them, and each is of one key."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from deployments.config.api import CaptureOptions
from deployments.core.errors import BadRequest, CapturePending
from deployments.host.inside.files import Shapes, data_bytes, header, numbers
from deployments.host.inside.vectors import VectorStore

_PREFIX = "troupe-captures-"
_GIB = 1 << 30
_PENDING_S = 30.0


@dataclass(slots=True, eq=False)
class _File:
    """A file that is, or is being, written."""

    id: str
    owner: str
    path: Path
    nbytes: int
    expires: float
    handle: dict[str, Any]
    sealed: asyncio.Event = field(default_factory=asyncio.Event)
    failed: bool = False


class CaptureStore:
    """Captures of the requests of one process. Its methods are for its event loop.

    Args:
        options: see `CaptureOptions`.
        place: part of every id, so that a replica is known by it.
    """

    def __init__(self, options: CaptureOptions, place: str = "") -> None:
        self.options = options
        self.vectors = VectorStore(options.vectors_ttl_s)
        self._place = place or uuid4().hex[:8]
        self._parent = Path(options.dir or tempfile.gettempdir())
        self._folder: Path | None = None
        self._files: dict[str, _File] = {}
        self._reserved = 0
        self._freed = asyncio.Condition()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="captures")
        _remove_left(self._parent)

    def new_id(self) -> str:
        """An id that nobody can guess."""
        return f"cap-{self._place}-{uuid4().hex}"

    @property
    def nbytes(self) -> int:
        """Bytes of all files, and those that running requests may need."""
        return self._reserved + sum(file.nbytes for file in self._files.values())

    def stats(self) -> dict[str, int]:
        """How many files there are, and their bytes."""
        return {"captures": len(self._files), "capture_bytes": self.nbytes}

    async def reserve(self, nbytes: int) -> None:
        """Wait until there is room for the captures of a request.

        Raises:
            BadRequest: there never is.
        """
        limit = int(self.options.gib * _GIB)
        if nbytes > limit:
            raise too_large(nbytes, limit, "api.captures.gib")
        async with self._freed:
            await self._freed.wait_for(lambda: self.nbytes + nbytes <= limit)
            self._reserved += nbytes

    def release(self, nbytes: int) -> None:
        """Give back what was reserved and not used."""
        self._reserved -= nbytes
        self._notify()

    def write(
        self, capture_id: str, owner: str, shapes: Shapes, meta: str, tensors: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Begin to write a file.

        Args:
            owner: digest of the key that may read it.
            shapes: of the tensors.
            meta: the file's metadata.
            tensors: gives them, in the writer's thread.

        Returns:
            The handle that the client gets.
        """
        start = header(shapes, meta)
        nbytes = len(start) + data_bytes(shapes)
        expires = time.time() + self.options.ttl_s
        handle = {"id": capture_id, "url": f"/v1/captures/{capture_id}", "bytes": nbytes, "expires": int(expires)}
        file = _File(capture_id, owner, self._private_folder() / capture_id, nbytes, expires, handle)
        self._files[capture_id] = file
        loop = asyncio.get_running_loop()
        loop.call_later(self.options.ttl_s, self.drop, capture_id)
        job = loop.run_in_executor(self._writer, _write, file.path, start, shapes, tensors)
        job.add_done_callback(lambda done: self._seal(file, done))
        return handle

    def describe(self, capture_id: str, fields: dict[str, Any]) -> None:
        """Add to the handle that `GET /v1/captures` lists."""
        self._files[capture_id].handle.update(fields)

    async def info(self, capture_id: str, owner: str) -> dict[str, Any] | None:
        """The handle of a file that is complete; None if there is no such file here.

        Raises:
            CapturePending: it is not complete in time.
        """
        file = self._find(capture_id, owner)
        if file is None:
            return None
        try:
            await asyncio.wait_for(file.sealed.wait(), _PENDING_S)
        except TimeoutError:
            raise CapturePending(
                f"The capture {capture_id!r} is still being written; try again.", retry_after=5
            ) from None
        return None if file.failed else dict(file.handle)

    async def piece(self, capture_id: str, owner: str, offset: int, size: int) -> bytes | None:
        """Bytes of a file; None if there is no such file here."""
        file = self._find(capture_id, owner)
        if file is None or not file.sealed.is_set():
            return None
        with contextlib.suppress(FileNotFoundError):
            return await asyncio.to_thread(_read, file.path, offset, size)
        return None

    async def handles(self, owner: str) -> list[dict[str, Any]]:
        """The handles of a key's own files."""
        return [dict(file.handle) for file in self._files.values() if file.owner == owner]

    async def delete(self, capture_id: str, owner: str) -> bool:
        """Drop a file; False if there is no such file here."""
        if self._find(capture_id, owner) is None:
            return False
        self.drop(capture_id)
        return True

    async def put_vector(self, data: bytes) -> str:
        """Keep an uploaded vector; its id."""
        return self.vectors.put(data)

    def drop(self, capture_id: str) -> None:
        """Drop a file that nobody will ask for, if it is there."""
        file = self._files.pop(capture_id, None)
        if file is not None:
            self._remove(file.path)
            self._notify()

    def close(self) -> None:
        """Drop all files. Blocks."""
        self._writer.shutdown(cancel_futures=True)
        self._files.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _find(self, capture_id: str, owner: str) -> _File | None:
        file = self._files.get(capture_id)
        return file if file is not None and file.owner == owner and file.expires > time.time() else None

    def _seal(self, file: _File, done: asyncio.Future[None]) -> None:
        file.failed = done.cancelled() or done.exception() is not None
        file.sealed.set()
        if file.failed or self._files.get(file.id) is not file:
            self.drop(file.id)
            self._remove(file.path)

    def _remove(self, path: Path) -> None:
        """Remove a file in the writer's thread, before any that is written later: a large one takes a while."""
        with contextlib.suppress(RuntimeError):  # the store is closed, and its folder goes
            self._writer.submit(path.unlink, missing_ok=True)

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._freed:
                self._freed.notify_all()

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._task = asyncio.get_running_loop().create_task(notify())

    def _private_folder(self) -> Path:
        if self._folder is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=self._parent))
        return self._folder


def too_large(nbytes: int, limit: int, key: str) -> BadRequest:
    """The error of a request whose captures may not fit."""
    return BadRequest(
        f"The captures of this request may take {nbytes / 2**20:.1f} MiB, more than the {limit / 2**20:.1f} MiB of "
        f"{key}; ask for fewer modules or positions, or lower max_tokens or n.",
        param="capture",
        code="capture_too_large",
    )


def _write(path: Path, start: bytes, shapes: Shapes, tensors: Callable[[], dict[str, Any]]) -> None:
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.write(start)
        for part in numbers(tensors(), shapes):
            file.write(part)


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _remove_left(parent: Path) -> None:
    """Remove the folders of processes that have ended without doing so."""
    for folder in parent.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)
