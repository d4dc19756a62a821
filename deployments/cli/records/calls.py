"""Recorded calls, and what each has to be sent again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.core.errors import ConfigError

CHAT, COMPLETIONS = "/chat/completions", "/completions"
# What asks only for another form of the same answer.
_FORM = ("stream", "stream_options", "capture")


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A line of the record.

    Attributes:
        place: the file and the number of the line.
    """

    place: str
    line: Mapping[str, Any]

    @property
    def skipped(self) -> str | None:
        """Why it is not replayed; None if it is."""
        line = self.line
        if not line:
            return "cut short at the end of its file"
        if line["error"] is not None:
            return "failed when recorded"
        if line["usage"] is None:
            return "given up by the client"
        if self.route is None:
            return "of a route that is not replayed"
        sampling = line["sampling"]
        if sampling["temperature"] != 0 and sampling["seed"] is None and sampling["max_tokens"] != 0:
            return "sampled without a seed"
        return None

    @property
    def route(self) -> str | None:
        """The route below /v1 that it was sent to; None for one that is not replayed."""
        path = str(self.line["path"])
        return next((route for route in (CHAT, COMPLETIONS) if path.endswith(route)), None)

    @property
    def variant(self) -> str | None:
        """The name of the model's variant that was asked, whose default fields are not in the request."""
        return self.line.get("variant")

    @property
    def steered(self) -> bool:
        """Whether the model was changed for it."""
        return self.variant is not None or bool(self.line["request"].get("interventions"))

    def body(self, model: str | None) -> dict[str, Any]:
        """The request in the form whose answer can be compared.

        Args:
            model: asked in place of the recorded one; None keeps it.
        """
        request = {key: value for key, value in self.line["request"].items() if key not in _FORM}
        return {**request, "model": self.asked(model), "return_token_ids": True}

    def asked(self, model: str | None) -> str:
        """The name of the model to ask: the given one, else the recorded one with its variant."""
        return str(model or self.variant or self.line["model"])

    @property
    def has_media(self) -> bool:
        """Whether a message has parts that are not text, for which token ids are not the whole prompt."""
        messages = self.line["request"].get("messages") or ()
        parts = (part for message in messages if isinstance(message, dict) for part in _parts(message.get("content")))
        return any(not isinstance(part, str) and "text" not in str(part.get("type", "text")) for part in parts)


def _parts(content: Any) -> Sequence[Any]:
    return [part for part in content if isinstance(part, str | dict)] if isinstance(content, list) else ()


def recorded_calls(places: Sequence[Path]) -> Iterator[RecordedCall]:
    """The calls of files, and of the record files of folders, in their order. What is written meanwhile is left out: a
    server that is asked may record into the same folder.

    Raises:
        ConfigError: a file is not there, or a line in it is not a recorded call.
    """
    paths = [path for place in places for path in (_files(place) if place.is_dir() else [place])]
    for path, end in [(path, _size(path)) for path in paths]:
        yield from _calls(path, end)


def _files(folder: Path) -> list[Path]:
    if not (files := sorted(folder.glob("calls-*.jsonl"))):
        raise ConfigError(f"{folder} has no record files (calls-*.jsonl); name the folder of api.record_dir.")
    return files


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _calls(path: Path, end: int) -> Iterator[RecordedCall]:
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield RecordedCall(f"{path.name}:{number}", _line(text, path, number))
                end -= len(text)
                if end <= 0:
                    return
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _line(text: bytes, path: Path, number: int) -> Mapping[str, Any]:
    try:
        line = json.loads(text)
    except ValueError:
        if not text.endswith(b"\n"):  # Its server was killed, or is writing it.
            return {}
        raise _not_a_call(path, number) from None
    try:
        missing = {"model", "path", "request", "sampling", "prompts", "choices", "usage", "error"} - line.keys()
    except AttributeError:
        raise _not_a_call(path, number) from None
    if missing:
        raise ConfigError(f"{path}, line {number}: a recorded call has {min(missing)!r}; this line has not.")
    return dict(line)


def _not_a_call(path: Path, number: int) -> ConfigError:
    return ConfigError(f"{path}, line {number}: it is not a recorded call (api.record_dir writes them).")
