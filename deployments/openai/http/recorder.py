"""The record: one JSON line for every call, with what was asked, what the model got and gave, and when."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from deployments.core.calls import LARGE, Call
from deployments.core.errors import ConfigError, TroupeError
from deployments.core.events import Accepted, Delta, Event, Failed, Finished
from deployments.core.json_text.writer import JsonWriter
from deployments.core.transcript import TranscriptionStarted, TranscriptSegment

logger = logging.getLogger(__name__)


class Recorder:
    """Appends to a file of its own in a folder, from a thread of its own; only this user can read it.

    Args:
        folder: made where it does not exist.
        max_bytes: a file that has grown beyond is followed by a new one.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._name = f"calls-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
        self._parts = itertools.count()
        self._lost = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as error:
            raise ConfigError(f"record_dir {folder!r} cannot be written: {error.strerror}.") from error
        self._lines: queue.SimpleQueue[tuple[dict[str, Any], bool]] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="record", daemon=True).start()

    async def tap(
        self, events: AsyncGenerator[Event, None], call: Call, request: Mapping[str, Any]
    ) -> AsyncGenerator[Event, None]:
        """The same events; when they end, however they do, the call is written.

        Args:
            request: what to write of the request besides the call.
        """
        line, large = _Line(call, request), LARGE.get()
        try:
            async with aclosing(events):
                async for event in events:
                    line.add(event)
                    yield event
        except TroupeError as error:
            line.add(Failed(error))
            raise
        finally:
            self._lines.put((line.finish(), large))

    def _open(self) -> BinaryIO:
        part = next(self._parts)
        path = self._folder / (f"{self._name}.{part}.jsonl" if part else f"{self._name}.jsonl")
        return os.fdopen(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "ab", buffering=0)

    def _write(self) -> None:
        while True:
            line, large = self._lines.get()
            text = _WRITER.data(line) if large else _WRITER.small(line)
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


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


class _Line:
    """The record of one call."""

    def __init__(self, call: Call, request: Mapping[str, Any]) -> None:
        self._begun = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": call.request_id,
            "model": call.model,
            **request,
            "sampling": call.sampling,
            "fingerprint": None,
            "prompts": [],
            "usage": None,
            "error": None,
        }

    def add(self, event: Event) -> None:
        match event:
            case Accepted():
                self._stamp("accepted")
                prompts = zip(event.prompt_texts, event.prompt_token_ids, strict=True)
                self._line["fingerprint"] = event.fingerprint
                self._line["prompts"] = [{"text": text, "token_ids": ids} for text, ids in prompts]
            case Delta():
                self._stamp("first")
                self._add(event)
            case TranscriptionStarted():
                self._line["fingerprint"] = event.fingerprint
            case TranscriptSegment():
                self._stamp("first")
                self._add(Delta(text=event.text))
            case Failed():
                self._line["error"] = _error(event.error)
            case Finished():
                self._line["usage"] = asdict(event.usage)

    def finish(self) -> dict[str, Any]:
        """The whole line. A call with neither usage nor error was given up by its client."""
        self._stamp("finished")
        return {**self._line, "choices": list(self._choices.values()), "seconds": self._seconds}

    def _add(self, delta: Delta) -> None:
        fresh = {"index": delta.choice, "text": "", "token_ids": [], "finish_reason": None, "stop_reason": None}
        choice = self._choices.setdefault(delta.choice, fresh)
        choice["text"] += delta.text
        choice["token_ids"].extend(delta.token_ids)
        if delta.logprobs is not None:
            choice.setdefault("logprobs", []).extend(token.logprob for token in delta.logprobs)
        if delta.finish_reason is not None:
            choice["finish_reason"], choice["stop_reason"] = delta.finish_reason, delta.stop_reason

    def _stamp(self, name: str) -> None:
        self._seconds.setdefault(name, round(time.monotonic() - self._begun, 6))


_WRITER = JsonWriter(nan=True, errors="backslashreplace", default=_plain)


def _error(error: TroupeError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "status": error.status}
