"""Reads values as models write them: JSON, Python literals and dialects of both, from a text that may go on."""

from __future__ import annotations

import functools
import json
import math
import re
from typing import Any

ANY = "…"
"""In a marker: any short text on one line."""
FENCE = r"```(?:json|\w{0,20}(?:tool|call|function)\w{0,20})?(?!\w)"
"""A pattern of what begins a block of Markdown that may hold calls."""
_FAR = 80
QUOTES = ('"', "'")
_LITERALS: dict[str, Any] = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_LITERALS |= {"NaN": math.nan, "Infinity": math.inf}
_NUMBER = re.compile(r"[-+.\w]+")
_WORD = re.compile(r"[^\W\d][\w.\-]*")
_SPACE = re.compile(r"\s*")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_ENDS = {quote: re.compile(rf"((?:[^\\{quote}]|\\.)*){quote}", re.DOTALL) for quote in "\"'"}
# A token that closes, and another one after it.
_LAST = re.compile(r"(\s*<[^<>\s]*(?:/|end|END|close|suffix|tool_call\|)[^<>\s]*>)\s*<[^<>\s]+>\s*\Z")
_DECODER = json.JSONDecoder(strict=False)
_DEEPEST = 64


class Incomplete(Exception):
    """More text decides. Its arguments: the name of a call and the values that are whole, if each stands by itself."""


class Unreadable(Exception):
    """Whatever follows, this is not what was expected."""


class Cursor:
    """A place in a text.

    Args:
        final: no more text follows; what would be `Incomplete` is `Unreadable`.

    Attributes:
        quotes: what may stand around a string.
    """

    def __init__(self, text: str, place: int = 0, *, final: bool = True) -> None:
        self.quotes: tuple[str, ...] = QUOTES
        self.text = text
        self.place = place
        self.final = final

    @property
    def at_end(self) -> bool:
        """Whether only white space is left of a text that is final."""
        return self.final and not self.text[self.place :].strip()

    def maybe(self, marker: str) -> bool:
        """Take a marker if the text goes on with it. White space around its words is free."""
        place = self.place
        for word, wild in _words(marker):
            found = self._far(word, place) if wild else self._near(word, place)
            if found is None:
                return False
            place = found
        self.place = place
        return True

    def closing(self, marker: str) -> bool:
        """Take a closing marker, or its beginning without the token that ends the turn."""
        if not marker.strip() or self.maybe(marker):
            return bool(marker.strip())
        found = _LAST.match(marker)
        return found is not None and self.maybe(found[1])

    def expect(self, marker: str) -> None:
        """Take a marker."""
        if not self.maybe(marker):
            raise Unreadable(marker)

    def match(self, pattern: re.Pattern[str]) -> str:
        """Take what matches; a match that more text could prolong is incomplete."""
        self.space()
        found = pattern.match(self.text, self.place)
        if found is None and self.place < len(self.text):
            raise Unreadable(pattern.pattern)
        if found is None or (found.end() == len(self.text) and not self.final):
            raise self.more()
        self.place = found.end()
        return found[0]

    def find(self, marker: str) -> int:
        """The place of the next occurrence of a marker's first word."""
        found = self.text.find(first_word(marker), self.place)
        if found < 0:
            raise self.more()
        return found

    def first(self, *markers: str) -> int:
        """The place of the first of the markers, by their first words."""
        places = [place for each in markers if each and (place := self.text.find(first_word(each), self.place)) >= 0]
        if not places:
            raise self.more()
        return min(places)

    def pass_over(self, pattern: re.Pattern[str], until: str) -> None:
        """Go to the next occurrence of a character; what stands before it must match."""
        found = self.text.find(until, self.place)
        if not pattern.fullmatch(self.text, self.place, found if found >= 0 else len(self.text)):
            raise Unreadable(until)
        if found < 0:
            raise self.more()
        self.place = found

    def skip(self, pattern: re.Pattern[str]) -> bool:
        """Take what matches, if anything does."""
        self.space()
        found = pattern.match(self.text, self.place)
        self.place = found.end() if found else self.place
        return found is not None

    def space(self) -> None:
        found = _SPACE.match(self.text, self.place)
        self.place = found.end() if found else self.place

    def more(self) -> Exception:
        """The error that more text is needed."""
        return Unreadable("the end") if self.final else Incomplete()

    def value(self, depth: int = 0) -> Any:
        """A JSON value. Python's literals, tuples, single quotes, bare keys and a last comma are read as well."""
        self.space()
        start = self.text[self.place : self.place + 1]
        if not start:
            raise self.more()
        if depth > _DEEPEST:
            raise Unreadable("nested too deep")
        for quote in self.quotes:
            if start == quote[0] and self.maybe(quote):
                return self._string(quote)
        if start in "{[(":
            return self._container(start, depth)
        if start in "-+.0123456789":
            return _number(self.match(_NUMBER))
        word = self.match(_WORD)
        if word not in _LITERALS:
            raise Unreadable(word)
        return _LITERALS[word]

    def _container(self, start: str, depth: int) -> Any:
        try:
            value, self.place = _DECODER.raw_decode(self.text, self.place)
        except (ValueError, RecursionError):
            self.place += 1
            return self._object(depth) if start == "{" else self._list("]" if start == "[" else ")", depth)
        return value

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.maybe("}"):
            key = self._key()
            self.expect(":")
            found[key] = self.value(depth + 1)
            if not self.maybe(","):
                self.expect("}")
                break
        return found

    def _key(self) -> str:
        quote = next((quote for quote in self.quotes if self.maybe(quote)), None)
        return self.match(_WORD) if quote is None else self._string(quote)

    def _list(self, end: str, depth: int) -> list[Any]:
        found = []
        while not self.maybe(end):
            found.append(self.value(depth + 1))
            if not self.maybe(","):
                self.expect(end)
                break
        return found

    def _string(self, quote: str) -> str:
        if quote in _ENDS:
            match = _ENDS[quote].match(self.text, self.place)
            if match is None:
                raise self.more()
            self.place = match.end()
            return _unescaped(match[1], quote)
        end = self.text.find(quote, self.place)
        if end < 0:
            raise self.more()
        body, self.place = self.text[self.place : end], end + len(quote)
        return body

    def _near(self, word: str, place: int) -> int | None:
        space = _SPACE.match(self.text, place)
        place = space.end() if space else place
        if self.text.startswith(word, place):
            return place + len(word)
        if not self.final and word.startswith(self.text[place : place + len(word)]):
            raise Incomplete
        return None

    def _far(self, word: str, place: int) -> int | None:
        found = self.text.find(word, place, place + _FAR)
        between = self.text[place : place + _FAR if found < 0 else found]
        if "\n" in between:
            return None
        if found < 0 and not self.final and len(between) < _FAR:
            raise Incomplete
        return None if found < 0 else found + len(word)


class JsonEnd:
    """Finds the end of an object or list that is fed in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, piece: str) -> int | None:
        """The place in this piece after which the value has ended; None if it goes on."""
        for place, character in enumerate(piece):
            if self._ends(character):
                return place + 1
        return None

    def _ends(self, character: str) -> bool:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


def first_word(marker: str) -> str:
    """What a marker begins with, up to white space or `…`."""
    return _words(marker)[0][0]


@functools.lru_cache(maxsize=1024)
def _words(marker: str) -> tuple[tuple[str, bool], ...]:
    """The words of a marker, and whether any text may stand before each."""
    words = []
    for index, part in enumerate(marker.split(ANY)):
        words += [(word, index > 0 and place == 0) for place, word in enumerate(part.split())]
    return tuple(words)


def _number(text: str) -> Any:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    raise Unreadable(text)


def _unescaped(body: str, quote: str) -> str:
    if quote == '"':
        try:
            return str(_DECODER.decode(f'"{body}"'))
        except ValueError:
            pass
    return _ESCAPE.sub(_escape, body)


def _escape(match: re.Match[str]) -> str:
    text = match[1]
    if text[0] in "ux" and len(text) > 1:
        return chr(int(text[1:], 16))
    return _ESCAPED.get(text, text if text in "\\'\"/" else match[0])
