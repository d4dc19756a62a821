"""The lines of a batch's input: each is a request as JSON (https://platform.openai.com/docs/guides/batch)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
_BOM = b"\xef\xbb\xbf"


class LineRefused(Exception):
    """A line that is not a request.

    Attributes:
        code: OpenAI's, such as `duplicate_custom_id`.
        custom_id: of the line; None if it has none.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line that can be sent."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line stands in its file.

    Attributes:
        number: of the line, from 1.
        offset, size: in bytes.
        model: as the line names it; empty if it names none.
    """

    number: int
    offset: int
    size: int
    model: str

    def read(self, path: Path) -> bytes:
        """The line."""
        with path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(slots=True)
class Index:
    """The lines of a file: those that can be sent, and why the others cannot.

    Attributes:
        total: number of lines that are not blank.
    """

    places: list[Place] = field(default_factory=list)
    refused: dict[int, LineRefused] = field(default_factory=dict)
    total: int = 0


def read_line(raw: bytes, endpoint: str | None) -> BatchLine:
    """A line as a request.

    Args:
        endpoint: that of the batch; None allows each.

    Raises:
        LineRefused: it cannot be sent.
    """
    try:
        found = json.loads(raw.removeprefix(_BOM))
    except (ValueError, RecursionError) as error:
        kinds = {UnicodeDecodeError: "it is not UTF-8", RecursionError: "it is nested too deeply"}
        why = kinds.get(type(error)) or getattr(error, "msg", str(error))
        raise LineRefused("invalid_json_line", f"This line is not parseable as valid JSON: {why}.") from None
    if not isinstance(found, dict):
        raise LineRefused("invalid_json_line", "This line is not a JSON object.")
    custom_id = found.get("custom_id")
    if custom_id is not None and (not isinstance(custom_id, str) or not custom_id):
        raise LineRefused("invalid_custom_id", "Invalid 'custom_id': input should be a text that is not empty.")
    try:
        _check(found, endpoint)
    except LineRefused as error:
        error.custom_id = custom_id
        raise
    return BatchLine(str(custom_id), found["url"], found["body"])


def _check(found: dict[str, Any], endpoint: str | None) -> None:
    for key in ("custom_id", "method", "url", "body"):
        if found.get(key) is None:
            raise LineRefused("missing_required_parameter", f"Missing required parameter: {key!r}.")
    if found["method"] != "POST":
        raise LineRefused("invalid_method", "Invalid 'method': only POST is supported.")
    allowed = ENDPOINTS if endpoint is None else (endpoint,)
    if found["url"] not in allowed:
        reason = f"there are {', '.join(ENDPOINTS)}" if endpoint is None else f"the batch has endpoint {endpoint!r}"
        raise LineRefused("invalid_url", f"Invalid 'url' {str(found['url'])[:100]!r}: {reason}.")
    if not isinstance(found["body"], dict):
        raise LineRefused("invalid_request", "Invalid 'body': input should be an object.")
    if found["body"].get("stream"):
        raise LineRefused("unsupported_parameter", "Invalid 'stream': a batch has no streams; leave it out.")


def index_of(path: Path, endpoint: str | None) -> Index:
    """All lines of a file that are not blank. Blocks.

    Raises:
        OSError: it cannot be read.
    """
    index, seen = Index(), set[str]()
    for number, offset, raw in _raw_lines(path):
        index.total += 1
        try:
            line = read_line(raw, endpoint)
            if line.custom_id in seen:
                raise LineRefused(
                    "duplicate_custom_id",
                    f"The custom_id {line.custom_id[:100]!r} is that of an earlier line.",
                    line.custom_id,
                )
        except LineRefused as error:
            error.message = f"Line {number}: {error.message}"
            index.refused[number] = error
            seen.update([error.custom_id] if error.custom_id is not None else ())
            continue
        seen.add(line.custom_id)
        model = line.body.get("model")
        index.places.append(Place(number, offset, len(raw), model if isinstance(model, str) else ""))
    return index


def _raw_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip(b" \t\r\n\xef\xbb\xbf"):
                yield number, offset, raw
            offset += len(raw)


def by_model(places: Iterable[Place]) -> list[Place]:
    """Lines of one model together, in the order in which the models come first."""
    order: dict[str, list[Place]] = {}
    for place in places:
        order.setdefault(place.model, []).append(place)
    return [place for group in order.values() for place in group]
