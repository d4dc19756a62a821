"""Reading the record: lines of JSON in files that several processes append to, newest first.

A line can be megabytes (images, log-probabilities of a whole vocabulary). Files are read backwards in blocks, and a
long line is never parsed: what a list says about it stands at its two ends.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from deployments.core.errors import BadRequest, RecordNotFound
from deployments.openai.record.answered import RECORD_FILE

_BLOCK = 256 * 2**10
_PARSED = 256 * 2**10
_END = 16 * 2**10
_SCANNED = 256 * 2**20
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A line of the record, as a list shows it.

    Attributes:
        finished: when the call ended, by which calls of several files are put in order.
        shown: its fields for the list.
    """

    finished: datetime
    shown: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RecordQuery:
    """Which calls of the record are wanted: those of a model, and those whose line contains a text."""

    model: str = ""
    text: str = ""

    @property
    def needle(self) -> bytes:
        """The text as it stands in a line of JSON."""
        return json.dumps(self.text, ensure_ascii=False)[1:-1].encode("utf-8", "backslashreplace")


@dataclass(slots=True)
class _Tail:
    """The lines of a file before `end`, the last one first. `scanned` counts the bytes that were read."""

    path: Path
    end: int
    scanned: int = 0
    next: tuple[int, int, RecordedCall] | None = None

    def advance(self) -> None:
        """Read the next line, or note that there is none."""
        self.next = None
        with self.path.open("rb") as file:
            while self.end > 0 and self.next is None:
                start = _line_start(file, self.end - 1)
                self.scanned += min(self.end - 1, -(-(self.end - start) // _BLOCK) * _BLOCK)  # whole blocks are read
                if (call := _summary(file, self.path.name, start, self.end)) is not None:
                    self.next = (start, self.end, call)
                self.end = start


def _line_start(file: BinaryIO, before: int) -> int:
    """Where the line begins that `before` lies in, or whose newline is there."""
    while before > 0:
        begin = max(0, before - _BLOCK)
        file.seek(begin)
        if (newline := file.read(before - begin).rfind(b"\n")) >= 0:
            return begin + newline + 1
        before = begin
    return 0


def _whole_lines(path: Path) -> int:
    """Where the last line that is complete ends."""
    with path.open("rb") as file:
        return _line_start(file, file.seek(0, 2))


class RecordFolder:
    """The record files of a folder; no other file is read. Methods block: call them in a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def calls(self, query: RecordQuery, limit: int, after: str = "") -> tuple[list[dict[str, Any]], str | None]:
        """The newest calls, and where to go on; None if there are no more.

        Args:
            after: where an earlier answer ended.

        Raises:
            BadRequest: `after` is not what an answer had.
        """
        merge = _Merge(self._files(), _ends(after))
        found: list[dict[str, Any]] = []
        for path, start, end, call in merge:
            if (not query.model or call.shown["model"] == query.model) and self._contains(path, start, end, query):
                found.append(call.shown)
            if len(found) == limit or merge.scanned > _SCANNED:
                return found, _cursor(merge.ends)
        return found, None

    def line(self, record: str) -> bytes:
        """A whole line, as it was written.

        Raises:
            RecordNotFound: there is no such line.
        """
        name, _, offset = record.rpartition(":")
        path = {file.name: file for file in self._files()}.get(name)
        if path is None or not offset.isdecimal() or len(offset) > 18:  # no file is as long as a number of 19 digits
            raise RecordNotFound(f"No recorded call {record[:200]!r}.")
        with path.open("rb") as file:
            before = max(0, int(offset) - 1)
            file.seek(before)
            if (int(offset) and file.read(1) != b"\n") or not (line := file.readline()).endswith(b"\n"):
                raise RecordNotFound(f"No recorded call {record[:200]!r}.")
        return line

    def _files(self) -> list[Path]:
        """The newest first."""
        files = [path for path in self._folder.iterdir() if RECORD_FILE.fullmatch(path.name) and path.is_file()]
        return sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)

    @staticmethod
    def _contains(path: Path, start: int, end: int, query: RecordQuery) -> bool:
        needle, kept = query.needle, b""
        if not needle:
            return True
        with path.open("rb") as file:
            file.seek(start)
            while start < end:
                block = file.read(min(_BLOCK, end - start))
                if needle in kept + block:
                    return True
                kept, start = block[-len(needle) :], start + len(block)
        return False


class _Merge:
    """The calls of all files, by the time at which they ended.

    A file is opened only when its last line can be the next one: a folder may hold those of many days.

    Attributes:
        ends: where each file that was opened goes on.
    """

    def __init__(self, files: list[Path], ends: Mapping[str, int]) -> None:
        self._closed = [path for path in files if path.name not in ends][::-1]
        self._tails = [self._opened(path, ends[path.name]) for path in files if path.name in ends]

    @property
    def ends(self) -> dict[str, int]:
        return {tail.path.name: tail.next[1] if tail.next else 0 for tail in self._tails}

    @property
    def scanned(self) -> int:
        return sum(tail.scanned for tail in self._tails)

    def __iter__(self) -> Iterator[tuple[Path, int, int, RecordedCall]]:
        while (tail := self._newest()) is not None:
            assert tail.next is not None
            start, end, call = tail.next
            tail.advance()
            yield tail.path, start, end, call

    def _newest(self) -> _Tail | None:
        while True:
            ready = [tail for tail in self._tails if tail.next is not None]
            best = max(ready, key=lambda tail: tail.next[2].finished if tail.next else datetime.min, default=None)
            if not self._closed:
                return best
            written = self._closed[-1].stat().st_mtime
            if best is not None and best.next is not None and best.next[2].finished.timestamp() > written + 1:
                return best
            path = self._closed.pop()
            self._tails.append(self._opened(path, _whole_lines(path)))

    @staticmethod
    def _opened(path: Path, end: int) -> _Tail:
        tail = _Tail(path, min(end, path.stat().st_size))
        tail.advance()
        return tail


def _cursor(ends: Mapping[str, int]) -> str:
    return base64.urlsafe_b64encode(json.dumps(ends).encode()).decode().rstrip("=")


def _ends(cursor: str) -> dict[str, int]:
    try:
        ends = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))) if cursor else {}
        if not isinstance(ends, dict) or not all(type(end) is int and end >= 0 for end in ends.values()):
            raise ValueError
    except (ValueError, RecursionError):
        raise BadRequest("Invalid 'after': send the 'next' of an earlier answer.", param="after") from None
    return ends


def _summary(file: BinaryIO, name: str, start: int, end: int) -> RecordedCall | None:
    """What the list says of a line; None for a line that the recorder did not write."""
    size = end - start
    file.seek(start)
    try:
        if size <= _PARSED:
            line = json.loads(file.read(size))
        else:
            head = file.read(_END)
            file.seek(end - _END)
            line = _from_ends(head.decode(errors="replace"), file.read(_END).decode(errors="replace"))
        began, seconds = datetime.fromisoformat(line["time"]), line["seconds"]["finished"]
        shown = {
            "record": f"{name}:{start}",
            "bytes": size,
            "seconds": line["seconds"],
            **{key: line.get(key) for key in ("time", "id", "request_id", "model", "path", "usage", "error")},
            **_texts(line),
        }
        return RecordedCall(began + timedelta(seconds=seconds), shown)
    except (ValueError, KeyError, TypeError):
        return None


_HEAD = re.compile(r'"(time|id|model|request_id|path)": ?("(?:[^"\\]|\\.)*")')


def _from_ends(head: str, tail: str) -> dict[str, Any]:
    """The fields before the request and after the choices of a line that is too long to be parsed."""
    fields = {key: json.loads(value) for key, value in _HEAD.findall(re.split('"request": ?{', head, maxsplit=1)[0])}
    seconds = tail[tail.rindex('"seconds":') :].rstrip().removesuffix("}")
    return {**fields, **json.loads(f"{{{seconds}}}")}


def _texts(line: Mapping[str, Any]) -> dict[str, Any]:
    """The beginnings of what was asked and answered, and how the choices ended."""
    request, choices = line.get("request") or {}, line.get("choices") or []
    messages = request.get("messages")
    asked = messages[-1].get("content") if messages else request.get("prompt", request.get("input"))
    if isinstance(asked, list):
        asked = " ".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in asked)
    return {
        "asked": str(asked or "")[:_SHOWN],
        "text": str(choices[0]["text"] if choices else "")[:_SHOWN],
        "finish_reasons": [choice["finish_reason"] for choice in choices],
    }
