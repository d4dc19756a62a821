"""Files and batches of one server, whichever route asks: the one process that keeps and runs them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from deployments.batches.client import BatchClient, Compute, NewFile, Page
from deployments.batches.database import BATCHES, Document
from deployments.batches.documents import new_batch, public
from deployments.batches.files import reason_of
from deployments.batches.pace import Pace
from deployments.batches.runner import Runner
from deployments.batches.store import Disk, Store
from deployments.batches.turns import Turns
from deployments.config.app import AppArgs
from deployments.core.client import ModelClient
from deployments.core.errors import BatchEnded, BatchNotFound, Unavailable

logger = logging.getLogger("troupe.batches")

T = TypeVar("T")

_OPEN_AGAIN_S = 0.5
_PATIENCE_S = 5.0
_SWEEP_S = 60.0


class Batches:
    """What `BatchClient` asks. Another server that uses the same folder is waited for.

    Args:
        args: the configuration, with `batches_dir`.
        models: computes the lines, by `compute`.
    """

    def __init__(self, args: AppArgs, models: ModelClient, compute: Compute) -> None:
        self._args = args
        self._models = models
        self._compute = compute
        self._disk = Disk()
        self._open_now: tuple[Store, Runner] | None = None
        self._opened = asyncio.Event()
        self._closed = Unavailable("Files and batches are not open yet; try again.", retry_after=1)

    @property
    def client(self) -> BatchClient:
        """Asks in this process."""
        return BatchClient(self.ask)

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of `BatchClient` asks for."""
        return await getattr(self, method)(*arguments)

    async def run(self) -> None:
        """Open the store and run its batches; until cancelled."""
        store = await self._open()
        runner = Runner(
            store, self._disk, self._compute, self._models, Pace(self._args, self._models), Turns(self._args)
        )
        self._open_now = store, runner
        self._opened.set()
        sweeping = asyncio.create_task(self._sweep(store))
        try:
            await runner.run()
        except Exception:
            logger.exception("Files and batches have stopped")
            raise
        finally:
            sweeping.cancel()
            await self._disk.run(store.close)
            self._disk.close()

    async def _open(self) -> Store:
        path = self._args.batches_dir
        assert path is not None
        said = ""
        while True:
            try:
                return await self._disk.run(partial(Store, path, self._args.api.batches))
            except Unavailable as error:
                self._closed = error
                if said != error.message:
                    said = error.message
                    logger.error("Files and batches in %s are off: %s", path, said)
            await asyncio.sleep(_OPEN_AGAIN_S)

    async def _sweep(self, store: Store) -> None:
        while True:
            with contextlib.suppress(OSError, sqlite3.Error):
                await self._disk.run(store.sweep)
            await asyncio.sleep(_SWEEP_S)

    async def _parts(self) -> tuple[Store, Runner]:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._opened.wait(), _PATIENCE_S)
        if self._open_now is None:
            raise self._closed
        return self._open_now

    async def _kept(self, function: Callable[[Store], T]) -> T:
        """What a function makes of the store, in its thread."""
        store, _ = await self._parts()
        try:
            return await self._disk.run(lambda: function(store))
        except sqlite3.Error as error:
            raise Unavailable(f"Files and batches cannot be written: {reason_of(error)}.", retry_after=60) from error

    async def begin_upload(self) -> str:
        return await self._kept(lambda store: store.files.begin())

    async def add_to_upload(self, upload: str, data: bytes) -> None:
        await self._kept(lambda store: store.files.add(upload, data))

    async def end_upload(self, upload: str, owner: str, new: NewFile) -> Document:
        return await self._kept(lambda store: store.files.end(upload, owner, new))

    async def drop_upload(self, upload: str) -> None:
        await self._kept(lambda store: store.files.drop(upload))

    async def files(self, owner: str, page: Page) -> tuple[list[Document], bool]:
        return await self._kept(lambda store: store.files.page(owner, page))

    async def file(self, file_id: str, owner: str) -> Document:
        return await self._kept(lambda store: store.files.get(file_id, owner))

    async def file_piece(self, file_id: str, owner: str, offset: int, size: int) -> bytes:
        return await self._kept(lambda store: store.files.piece(file_id, owner, offset, size))

    async def delete_file(self, file_id: str, owner: str) -> None:
        await self._kept(lambda store: store.delete_file(file_id, owner))

    async def create_batch(self, owner: str, fields: Mapping[str, Any]) -> Document:
        document = new_batch(fields)

        def keep(store: Store) -> None:
            store.files.get(document["input_file_id"], owner, "input_file_id")
            store.database.add(BATCHES, owner, document)

        await self._kept(keep)
        _, runner = await self._parts()
        return runner.add(document, owner).view()

    async def batches(self, owner: str, page: Page) -> tuple[list[Document], bool]:
        _, runner = await self._parts()
        found, more = await self._kept(lambda store: store.database.page(BATCHES, owner, page))
        return [runner.jobs[each["id"]].view() if each["id"] in runner.jobs else public(each) for each in found], more

    async def batch(self, batch_id: str, owner: str) -> Document:
        _, runner = await self._parts()
        found = await self._kept(lambda store: store.database.get(BATCHES, batch_id, owner))
        if found is None:
            raise BatchNotFound(f"No batch found with id {batch_id[:100]!r}.", param="id")
        return runner.jobs[batch_id].view() if batch_id in runner.jobs else public(found)

    async def cancel_batch(self, batch_id: str, owner: str) -> Document:
        found = await self.batch(batch_id, owner)
        _, runner = await self._parts()
        job = runner.jobs.get(batch_id)
        if job is None:
            raise BatchEnded(f"Cannot cancel a batch with status {found['status']!r}.", param="id")
        await runner.cancel(job)
        return job.view()
