"""Carries batches from their first line to their last, over any number of restarts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from deployments.batches.client import Compute, LineAnswer
from deployments.batches.computing import LineSender
from deployments.batches.database import BATCHES, FILES, Document
from deployments.batches.documents import set_errors, set_status
from deployments.batches.files import reason_of
from deployments.batches.job import Job
from deployments.batches.lines import LineRefused, Place
from deployments.batches.pace import Pace
from deployments.batches.results import refused_line, result_line
from deployments.batches.store import Disk, Store
from deployments.batches.turns import Turns
from deployments.core.client import ModelClient
from deployments.core.errors import ModelNotFound, TroupeError

logger = logging.getLogger("troupe.batches")

T = TypeVar("T")

_TICK_S = 0.25
_AGAIN_S = 2.0
_INTERNAL = b'{"error": {"code": "internal_error", "message": "The server failed on this line; its log says why."}}'


class Runner:
    """The batches that have not ended.

    Attributes:
        jobs: these batches, by id.
    """

    def __init__(
        self, store: Store, disk: Disk, compute: Compute, models: ModelClient, pace: Pace, turns: Turns
    ) -> None:
        self.jobs: dict[str, Job] = {}
        self._store = store
        self._disk = disk
        self._sender = LineSender(compute)
        self._models = models
        self._pace = pace
        self._turns = turns
        self._ready: list[Job] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Go on with the batches of the store, and with those that are added; until cancelled."""
        for owner, document in await self._disk.run(self._store.unfinished):
            self.add(document, owner)
        try:
            while True:
                self._wake.clear()
                if self._ready:
                    self._pace.look()
                self._start_lines()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), _TICK_S if self._ready else None)
        finally:
            await self._close()

    async def _close(self) -> None:
        tasks = [*self._tasks, *(task for job in self.jobs.values() for task in job.running.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def add(self, document: Document, owner: str) -> Job:
        """Begin a batch, or go on with it."""
        job = self.jobs[document["id"]] = Job(document, owner, self._store.folder)
        task = asyncio.create_task(self._carry(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def cancel(self, job: Job) -> None:
        """Start no more lines of a batch, and end those that run."""
        if not job.stop:
            job.stop = "cancelled"
            set_status(job.document, "cancelling")
            job.changed.set()
            # A full disk must not keep a batch from being cancelled.
            with contextlib.suppress(OSError, sqlite3.Error):
                await self._disk.run(partial(self._save, job))

    async def _carry(self, job: Job) -> None:
        """All of a batch."""
        try:
            if await self._read(job):
                await self._lines_done(job)
                await self._finish(job)
        except Exception as error:
            logger.exception("Batch %s failed", job.document["id"])
            await self._fail(job, "internal_error", f"The server failed on this batch ({type(error).__name__}).")
        finally:
            del self.jobs[job.document["id"]]
        await self._disk.run(self._store.sweep)

    async def _read(self, job: Job) -> bool:
        """Read the input, and write errors for lines that cannot be sent; False if nothing is to be done."""
        try:
            index = await asyncio.to_thread(job.read)
        except FileNotFoundError:
            await self._fail(job, "invalid_file", "The input file is no longer there.")
            return False
        if not index.total:
            await self._fail(job, "empty_file", "The input file is empty; send one request as JSON per line.")
            return False
        if lines := [refused_line(job.key, number, refused) for number, refused in index.refused.items()]:
            await self._written(job, partial(job.write, "failed", lines))
        job.seat({model: await self._seat(model) for model in job.pending})
        if job.document["status"] == "validating":
            set_status(job.document, "in_progress")
            await self._written(job, partial(self._save, job))
        return True

    async def _seat(self, name: str) -> str:
        """The id of the model that is loaded for a name; empty if there is none, of which each line gets an error."""
        try:
            with contextlib.suppress(ModelNotFound):
                card = self._models.resolve(name) if name else self._models.models()[0]
                return card.parent or card.id
            if await self._models.discover(name):
                card = self._models.resolve(name)
                return card.parent or card.id
        except TroupeError as error:
            logger.info("Model %r of a batch: %s", name, error)
        return ""

    async def _lines_done(self, job: Job) -> None:
        """Returns when all lines have results, or the batch is cancelled or expires."""
        self._ready.append(job)
        self._wake.set()
        try:
            while not job.done and not job.stop:
                job.changed.clear()
                with contextlib.suppress(TimeoutError):
                    left = job.document["expires_at"] - time.time()
                    await asyncio.wait_for(job.changed.wait(), max(0.0, left))
                if not job.done and not job.stop and job.document["expires_at"] <= time.time():
                    job.stop = "expired"
        finally:
            self._ready.remove(job)
            await job.interrupt()

    async def _finish(self, job: Job) -> None:
        """Make files of the results, and end the batch."""
        if job.stop == "expired":
            await self._written(job, job.expire)
        elif not job.stop:
            set_status(job.document, "finalizing")
            await self._written(job, partial(self._save, job))
        await self._written(job, partial(self._end, job, job.stop or "completed"))
        logger.info("Batch %s: %s, %s", job.document["id"], job.document["status"], job.document["request_counts"])

    def _end(self, job: Job, status: str) -> None:
        """Save the batch with its files, all at once. Blocks."""
        files = job.results()
        document = job.ended(status, files)
        self._store.database.write([*((FILES, job.owner, file) for file in files), (BATCHES, job.owner, document)])
        job.document.update(document)

    async def _fail(self, job: Job, code: str, message: str) -> None:
        """End a batch of which nothing can be computed."""
        document = job.ended("failed", [])
        set_errors(document, [{"code": code, "message": message}])
        await self._written(job, lambda: self._store.database.write([(BATCHES, job.owner, document)]))

    def _save(self, job: Job) -> None:
        job.update()
        self._store.database.write([(BATCHES, job.owner, job.document)])

    def _start_lines(self) -> None:
        """Start as many lines as there is room for."""
        running = self._turns.running
        for turn in self._turns.now(self._ready):
            room = self._pace.limit(turn.seat, running[turn.seat], running.total()) - running[turn.seat]
            while room > 0 and (job := turn.next()) is not None:
                place = job.take(turn.seat)
                assert place is not None
                running[turn.seat] += 1
                task = job.running[place.number] = asyncio.create_task(self._line(job, place))
                task.add_done_callback(partial(self._line_ended, job, place, turn.seat))
                room -= 1

    async def _line(self, job: Job, place: Place) -> None:
        """Compute a line and write what came of it."""
        try:
            kind, line = await self._result(job, place)
        except (OSError, LineRefused):
            logger.exception("Line %d of batch %s can no longer be read", place.number, job.document["id"])
            job.stop = "failed"
            return
        job.writing.add(place.number)
        await self._written(job, partial(job.write, kind, [line]))

    def _line_ended(self, job: Job, place: Place, seat: str, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # perhaps before it has begun
            job.put_back(place)
        job.writing.discard(place.number)
        del job.running[place.number]
        self._turns.running[seat] -= 1
        job.changed.set()
        self._wake.set()

    async def _result(self, job: Job, place: Place) -> tuple[str, bytes]:
        """Whether a line was completed, and its result."""
        custom_id, call = await asyncio.to_thread(job.call, place)
        try:
            answer = await self._sender.answer(call)
        except Exception:
            logger.exception("Line %d of batch %s failed", place.number, job.document["id"])
            answer = LineAnswer(status=500, body=_INTERNAL)
        return "completed" if answer.status == 200 else "failed", result_line(job.key, place.number, custom_id, answer)

    async def _written(self, job: Job, write: Callable[[], T]) -> T:
        """The result of what writes to the disk, tried again until it can be written."""
        while True:
            try:
                done = await self._disk.run(write)
                job.paused = ""
                return done
            except (OSError, sqlite3.Error) as error:
                if not job.paused:
                    logger.error("Batch %s is paused: %s", job.document["id"], error)
                job.paused = (
                    f"The batch is paused: its results cannot be written ({reason_of(error)}). It goes on by itself "
                    "when they can."
                )
            await asyncio.sleep(_AGAIN_S)
