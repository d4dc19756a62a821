"""Calls that the record can answer again, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.core.calls import Call, GenerateCall
from deployments.core.errors import BadRequest
from deployments.core.events import Event
from deployments.core.one_version import OneVersion
from deployments.openai.record.line import call_digest, events, is_repeatable

RESUME_HEADER = "x-troupe-resume"
RESUMED_HEADER = "x-troupe-resumed"
RECORD_FILE = re.compile(r"calls-[\w.-]+\.jsonl")
_CALL = re.compile(rb'"call": ?(?:null|"([0-9a-f]{32})")')
_HEAD = 4096
_SWITCH = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class RecordedAnswer:
    """An answer of the record.

    Attributes:
        record: its address, for `GET /records/{record}`.
    """

    record: str
    _events: Iterator[Event]

    async def events(self) -> AsyncGenerator[Event, None]:
        """The same events as of the model, all of a choice at once."""
        for event in self._events:
            yield event


class Answered:
    """The calls in the record files of a folder, whichever process has written them.

    Only the digest and the place of each call are kept in memory. A call that is not known lets new lines be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends: dict[str, int] = {}
        self._places: dict[bytes, tuple[str, int]] = {}
        self._lock = threading.Lock()

    async def find(self, call: Call, client: OneVersion) -> RecordedAnswer | None:
        """The recorded answer of a call to the model as it is now; None if there is none.

        Raises:
            TroupeError: the model cannot be loaded.
        """
        if not isinstance(call, GenerateCall) or not is_repeatable(call):
            return None
        parts = await client.fingerprint_parts(call.model)
        return await asyncio.to_thread(self._find, call, str(parts["fingerprint"]))

    def _find(self, call: GenerateCall, fingerprint: str) -> RecordedAnswer | None:
        digest = bytes.fromhex(call_digest(call, fingerprint))
        try:
            with self._lock:
                if digest not in self._places:
                    self._look()
                place = self._places.get(digest)
            if place is None:
                return None
            line = self._line(*place)
        except (OSError, ValueError):  # A file was removed or changed meanwhile.
            return None
        found = events(line, call) if line.get("call") == digest.hex() else None
        return None if found is None else RecordedAnswer(f"{place[0]}:{place[1]}", found)

    def _line(self, name: str, start: int) -> Mapping[str, Any]:
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            return dict(json.loads(file.readline()))

    def _look(self) -> None:
        """Take note of the calls that were written since the last time."""
        for path in self._folder.iterdir():
            if RECORD_FILE.fullmatch(path.name) and path.stat().st_size > self._ends.get(path.name, 0):
                self._read(path)

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            start = file.seek(self._ends.get(path.name, 0))
            while (line := file.readline()).endswith(b"\n"):
                if (found := _CALL.search(line, 0, _HEAD)) and found[1]:
                    self._places[bytes.fromhex(found[1].decode())] = (path.name, start)
                start += len(line)
            self._ends[path.name] = start


def resumes(asked: str | None, *, default: bool, records: bool) -> bool:
    """Whether a request may be answered from the record.

    Args:
        asked: the header `x-troupe-resume`.
        default: `api.resume`.
        records: this server has a record.

    Raises:
        BadRequest: the header is not true or false, or there is no record.
    """
    if asked is None:
        return default
    wanted = _SWITCH.get(asked.strip().lower())
    if wanted is None:
        raise BadRequest(f"Invalid header {RESUME_HEADER}: {asked[:80]!r}; send true or false.", param=RESUME_HEADER)
    if wanted and not records:
        raise BadRequest(
            f"Invalid header {RESUME_HEADER}: this server records no calls; set api.record_dir.", param=RESUME_HEADER
        )
    return wanted
