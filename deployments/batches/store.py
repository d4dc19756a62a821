"""The folder, the database and the files of one server, and the thread that alone uses them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from deployments.batches.database import BATCHES, Database, Document
from deployments.batches.documents import files_in_use
from deployments.batches.files import Files
from deployments.batches.folder import Folder
from deployments.config.api import BatchOptions
from deployments.core.errors import Unavailable

T = TypeVar("T")


class Disk:
    """A thread in which all writes happen, one after the other."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    async def run(self, function: Callable[[], T]) -> T:
        """The result of a function that blocks."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        """End the thread when it has done what it was given."""
        self._thread.shutdown()


class Store:
    """What one server keeps. For one thread: every method blocks.

    Raises:
        Unavailable: the folder cannot be used now.
    """

    def __init__(self, path: Path, options: BatchOptions) -> None:
        self.folder = Folder(path, int(options.disk_gib * 2**30))
        try:
            self.database = Database(path / "batches.sqlite")
        except sqlite3.Error as error:
            self.folder.close()
            raise Unavailable(f"batches.sqlite in the server's state_dir cannot be used: {error}.") from error
        self.files = Files(self.folder, self.database, options)

    def unfinished(self) -> list[tuple[str, Document]]:
        """The owner and the document of each batch that has not ended, the oldest first."""
        return [(owner, document) for owner, document in self.database.all(BATCHES) if files_in_use(document)]

    def delete_file(self, file_id: str, owner: str) -> None:
        """Delete a file; its content stays as long as a batch reads it."""
        self.files.delete(file_id, owner)
        self.sweep()

    def sweep(self) -> None:
        """Delete files that have expired, and content that nobody has any more."""
        self.files.sweep(set[str]().union(*(files_in_use(document) for _, document in self.unfinished())))

    def close(self) -> None:
        """Let another process use the folder."""
        self.database.close()
        self.folder.close()
