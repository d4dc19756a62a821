"""The record: one JSON line for every call, with what was asked, what the model got and gave, and when."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import queue
import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from deployments.core.calls import LARGE, Call, GenerateCall
from deployments.core.errors import ConfigError, TroupeError
from deployments.core.events import Event, Failed
from deployments.openai.record.answered import Answered
from deployments.openai.record.line import WRITER, RecordLine, call_digest, is_repeatable

logger = logging.getLogger(__name__)


class Recorder:
    """Appends to a file of its own in a folder, from a thread of its own; only this user can read it.

    Attributes:
        answered: the calls of all files of the folder that can be answered again.

    Args:
        folder: made where it does not exist.
        max_bytes: a file that has grown beyond is followed by a new one.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._folder = Path(folder)
        self.answered = Answered(self._folder)
        self._max_bytes = max_bytes
        self._name = f"calls-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
        self._parts = itertools.count()
        self._lost = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as error:
            raise ConfigError(f"record_dir {folder!r} cannot be written: {error.strerror}.") from error
        self._lines: queue.SimpleQueue[tuple[dict[str, Any], Call, bool]] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="record", daemon=True).start()

    async def tap(
        self, events: AsyncGenerator[Event, None], call: Call, request: Mapping[str, Any], *, whole: bool = False
    ) -> AsyncGenerator[Event, None]:
        """The same events; when they end, however they do, the call is written.

        Args:
            request: what to write of the request besides the call.
            whole: see `RecordLine`.
        """
        line, large = RecordLine(call, request, whole=whole), LARGE.get()
        try:
            async with aclosing(events):
                async for event in events:
                    line.add(event)
                    yield event
        except TroupeError as error:
            line.add(Failed(error))
            raise
        finally:
            self._lines.put((line.finish(), call, large))

    def _open(self) -> BinaryIO:
        part = next(self._parts)
        path = self._folder / (f"{self._name}.{part}.jsonl" if part else f"{self._name}.jsonl")
        return os.fdopen(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "ab", buffering=0)

    def _write(self) -> None:
        while True:
            line, call, large = self._lines.get()
            if line["usage"] is not None and isinstance(call, GenerateCall) and is_repeatable(call):
                line["call"] = call_digest(call, line["fingerprint"])
            text = WRITER.data(line) if large else WRITER.small(line)
            try:
                self._append(text + b"\n")
            except OSError as error:
                self._lost += 1
                if self._lost == 1:
                    logger.error("Calls are no longer recorded: %s. Answers are not affected.", error)
            else:
                if self._lost:
                    logger.warning("Calls are recorded again; %d were lost.", self._lost)
                self._lost = 0

    def _append(self, line: bytes) -> None:
        """Write a whole line or nothing of it."""
        size = os.fstat(self._file.fileno()).st_size
        if size > self._max_bytes:
            self._file.close()
            self._file, size = self._open(), 0
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise
