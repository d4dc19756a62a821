"""The parts of a model's text, and the classes that split a streamed text into parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A tool call whose arguments follow in pieces."""

    name: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    """More of the arguments of the call that has begun."""

    text: str


Part = Content | Reasoning | Call | CallBegun | CallPiece


class Splitter(Protocol):
    """Splits the text of one choice. No text is lost: what is neither a call nor reasoning is content."""

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain after this text."""

    def finish(self) -> list[Part]:
        """The parts that were held back; nothing is fed afterwards."""


class Plain:
    """All text is content."""

    def feed(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        return []


class ContentSplitter:
    """Splits what another splitter finds to be content once more."""

    def __init__(self, first: Splitter, then: Splitter) -> None:
        self._first = first
        self._then = then

    def feed(self, text: str) -> list[Part]:
        return self._split(self._first.feed(text))

    def finish(self) -> list[Part]:
        return [*self._split(self._first.finish()), *self._then.finish()]

    def _split(self, parts: list[Part]) -> list[Part]:
        split: list[Part] = []
        for part in parts:
            split += self._then.feed(part.text) if isinstance(part, Content) else [part]
        return split
