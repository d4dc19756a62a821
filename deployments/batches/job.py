"""A batch that has not ended: which lines are to be computed, and what came of the others."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from deployments.batches.client import LineCall
from deployments.batches.database import Document
from deployments.batches.documents import key_of, public, result_ids, result_object, set_errors, set_status
from deployments.batches.folder import Folder
from deployments.batches.lines import Index, LineRefused, Place, index_of, read_line
from deployments.batches.results import ResultFile, refused_line, request_id

_EXPIRED = "This request could not be executed before the completion window expired."
_MANY = 1000


class Job:
    """A batch and its files.

    Attributes:
        document: the batch object.
        owner: whose it is.
        pending: lines that wait, by their model's name.
        running: the tasks of lines that are computed, by number.
        writing: numbers of those whose results are being written.
        paused: why results cannot be written; empty if they can.
        stop: the status that the batch ends with before all of its lines are done; empty if it goes on.
    """

    def __init__(self, document: Document, owner: str, folder: Folder) -> None:
        self.document = document
        self.owner = owner
        self.key = key_of(document)
        self.pending: dict[str, deque[Place]] = {}
        self.running: dict[int, asyncio.Task[None]] = {}
        self.writing: set[int] = set()
        self.paused = ""
        self.stop = "cancelled" if document["status"] == "cancelling" else ""
        self.changed = asyncio.Event()
        self.input: Path = folder.file(document["input_file_id"])
        self._folder = folder
        self._seats: Mapping[str, str] = {}
        self._counts = {"completed": 0, "failed": 0}
        files = (ResultFile(self._folder.file(file_id)) for file_id in result_ids(document))
        self._files = dict(zip(self._counts, files, strict=True))

    def read(self) -> Index:
        """The lines of the input; those that have no result yet are pending. Blocks.

        Raises:
            OSError: the files cannot be read.
        """
        index = index_of(self.input, self.document["endpoint"])
        self.document["request_counts"]["total"] = index.total
        done = set[int]()
        for kind, file in self._files.items():
            numbers = {number for number, _ in file.recover(self.key)} - done
            self._counts[kind] = len(numbers)
            done |= numbers
        index.refused = {number: line for number, line in index.refused.items() if number not in done}
        self.pending = {}
        for place in index.places:
            if place.number not in done:
                self.pending.setdefault(place.model, deque()).append(place)
        return index

    def write(self, kind: str, lines: Sequence[bytes]) -> None:
        """Write lines of results, and count them when they are on the disk. Blocks.

        Args:
            kind: completed or failed.

        Raises:
            OSError: they cannot be written.
        """
        size = sum(map(len, lines))
        self._folder.take(size)
        try:
            self._files[kind].append(lines)
        except OSError:
            self._folder.give_back(size)
            raise
        self._counts[kind] += len(lines)

    def expire(self) -> None:
        """Write an error for each line that has no result. Blocks; raises OSError."""
        while places := list(itertools.islice(itertools.chain(*self.pending.values()), _MANY)):
            self.write("failed", [refused_line(self.key, each.number, self._expired(each)) for each in places])
            for each in places:
                self.pending[each.model].remove(each)

    def _expired(self, place: Place) -> LineRefused:
        line = read_line(place.read(self.input), self.document["endpoint"])
        return LineRefused("batch_expired", _EXPIRED, line.custom_id)

    def seat(self, places: Mapping[str, str]) -> None:
        """Say where each model is loaded, by its name in the lines."""
        self._seats = places

    def waits_for(self) -> list[str]:
        """Where the models of the lines that wait are loaded, the first line's first."""
        return [self._seats[model] for model, places in self.pending.items() if places]

    def take(self, seat: str) -> Place | None:
        """A line of a model that is loaded there, to be computed now; None if there is none."""
        for model, places in self.pending.items():
            if places and self._seats[model] == seat:
                return places.popleft()
        return None

    def put_back(self, place: Place) -> None:
        """Let a line wait that was not computed."""
        self.pending[place.model].appendleft(place)

    async def interrupt(self) -> None:
        """Returns when no line is computed: results that are known are written."""
        tasks = dict(self.running)
        for number, task in tasks.items():
            if number not in self.writing:
                task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        await asyncio.sleep(0)  # for what is done at the end of each

    def call(self, place: Place) -> tuple[str, LineCall]:
        """The custom_id of a line, and the line as a request. Blocks."""
        line = read_line(place.read(self.input), self.document["endpoint"])
        named = request_id(self.key, place.number)
        return line.custom_id, LineCall(url=line.url, body=line.body, owner=self.owner, request_id=named)

    @property
    def done(self) -> bool:
        """Whether all lines have results."""
        return not self.running and not any(self.pending.values())

    def results(self) -> list[Document]:
        """The objects of the files with results that have lines."""
        found = []
        for which, file in zip(("output", "error"), self._files.values(), strict=True):
            file.close()
            if file.path.exists() and (size := file.path.stat().st_size):
                found.append(result_object(self.document, which, size))
        return found

    def ended(self, status: str, files: Sequence[Document]) -> Document:
        """The document with its last status.

        Args:
            files: see `results`.
        """
        self.paused = ""
        self.update()
        document = {**self.document, "errors": None}
        output, _ = result_ids(document)
        for file in files:
            document["output_file_id" if file["id"] == output else "error_file_id"] = file["id"]
        set_status(document, status)
        return document

    def update(self) -> None:
        """Bring the counts, and why the batch is paused, into the document."""
        self.document["request_counts"].update(self._counts)
        set_errors(self.document, [{"code": "disk_full", "message": self.paused}] if self.paused else [])

    def view(self) -> Document:
        """The batch as clients see it now."""
        self.update()
        return public(self.document)
