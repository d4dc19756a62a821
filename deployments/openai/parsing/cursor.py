"""Reads a text that may go on: markers, and values as models write them, in JSON, Python or a dialect of these."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import regex

ANY = "…"
"""In a marker: any short text on one line."""
FENCE = r"```(?:json|\w{0,20}(?:tool|call|function)\w{0,20})?(?!\w)"
"""A pattern of what begins a block of Markdown that may hold calls."""
LITERALS: dict[str, Any] = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
LITERALS |= {"NaN": math.nan, "Infinity": math.inf}
"""The words that are values."""
_SCALAR = regex.compile(r"\s*[-+.\w]++")
_KEY = regex.compile(r"\s*[^\s<>\"'=:,(){}\[\]]++")
_OPENING = regex.compile(r"\s*([\[{(])")
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_ESCAPE = regex.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", regex.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
# A token that closes, and another one after it.
_LAST = regex.compile(r"(\s*<[^<>\s]*(?:/|end|END|close|suffix|tool_call\|)[^<>\s]*>)\s*<[^<>\s]+>\s*\Z")
_DECODER = json.JSONDecoder(strict=False)
_END = regex.compile("(?P<text>)")
_DEEPEST = 64
# Of what a pattern matches.
_LONGEST = 512


class Incomplete(Exception):
    """More text decides. Its arguments: the name of a call and the values that are whole, if each stands by itself."""


class Unreadable(Exception):
    """Whatever follows, this is not what was expected."""


class Cursor:
    """A place in a text.

    Args:
        final: no more text follows; what would be `Incomplete` is `Unreadable`.
        quote: what may stand around a string beside quotes.
    """

    def __init__(self, text: str, place: int = 0, *, final: bool = True, quote: str = "") -> None:
        self._strings = _strings_of(quote)
        self.text = text
        self.place = place
        self.final = final

    def take(self, pattern: regex.Pattern[str]) -> regex.Match[str] | None:
        """Take what matches, if anything does; what more text could make a match is incomplete."""
        found = pattern.match(self.text, self.place, partial=not self.final)
        if found is not None and found.partial:
            raise Incomplete
        self.place = self.place if found is None else found.end()
        return found

    def need(self, pattern: regex.Pattern[str]) -> regex.Match[str]:
        """Take what has to match; a match that more text could prolong is incomplete."""
        found = self.take(pattern)
        if found is None:
            raise Unreadable(pattern.pattern)
        if self.place == len(self.text) and not self.final:
            raise Incomplete
        return found

    def maybe(self, marker: str) -> bool:
        """Take a marker if the text goes on with it. White space around its words is free."""
        return self.take(_compiled(marker)) is not None

    def expect(self, marker: str) -> None:
        """Take a marker."""
        if not self.maybe(marker):
            raise Unreadable(marker)

    def closing(self, marker: str) -> bool:
        """Take a closing marker, or its beginning without the token that ends the turn."""
        return any(map(self.maybe, closings_of(marker)))

    def find(self, ends: Scan) -> regex.Match[str]:
        """Take the text up to an end, and that."""
        found, _ = ends.next(self.text, self.final, self.place)
        if found is None:
            raise Unreadable("the end") if self.final else Incomplete
        self.place = found.end()
        return found

    def value(self, depth: int = 0) -> Any:
        """A JSON value. Python's literals, tuples, single quotes, bare keys and a last comma are read as well."""
        if depth > _DEEPEST:
            raise Unreadable("nested too deep")
        if (text := self._string()) is not None:
            return text
        if (opening := self.take(_OPENING)) is None:
            return _scalar(self.need(_SCALAR)[0].lstrip())
        with contextlib.suppress(ValueError, RecursionError):
            value, self.place = _DECODER.raw_decode(self.text, opening.start(1))
            return value
        end = _CLOSING[opening[1]]
        if end == "}":
            return dict(self.items(end, lambda: self.pair(":", depth + 1)))
        return self.items(end, lambda: self.value(depth + 1))

    def items(self, end: str, read: Callable[[], Any]) -> list[Any]:
        """What stands between commas up to an end, which is taken as well."""
        found = []
        while not self.maybe(end):
            found.append(read())
            if not self.maybe(","):
                self.expect(end)
                break
        return found

    def pair(self, sign: str, depth: int = 0) -> tuple[str, Any]:
        """A key, bare or in quotes, the sign after it, and a value."""
        text = self._string()
        key = self.need(_KEY)[0].lstrip() if text is None else text
        self.expect(sign)
        return key, self.value(depth)

    def _string(self) -> str | None:
        """A text in quotes; None if no quote begins here."""
        found = self.take(self._strings)
        return found and (_unescaped(found["said"]) if found["raw"] is None else found["raw"])


class Scan:
    """Finds the first of some patterns. The name of its group says which it is.

    Args:
        patterns: by the names of their groups; of several at one place the first wins. An empty one is left out.
    """

    def __init__(self, patterns: dict[str, str]) -> None:
        any_of = "|".join(f"(?P<{name}>{pattern})" for name, pattern in patterns.items() if pattern) or "(?!)"
        self.pattern = regex.compile(any_of)
        # Matches nothing: as far as it comes at the end of a text, more text could make a match, or a longer one.
        self._tail = regex.compile(rf"(?:{any_of})\Z(?s:.)")

    def next(self, text: str, final: bool, start: int = 0) -> tuple[regex.Match[str] | None, int]:
        """The next match, if it is certain, and up to where it is certain that there is none."""
        found = self.pattern.search(text, start)
        place = len(text) if found is None else found.start()
        if not final and len(text) - place < _LONGEST:
            tail = self._tail.search(text, max(start, len(text) - _LONGEST), partial=True)
            if tail is not None and tail.start() <= place:
                return None, tail.start()
        return found, place


class JsonEnd:
    """Finds the end of an object or list whose text comes in pieces, as `Scan` does."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def next(self, text: str, final: bool) -> tuple[regex.Match[str] | None, int]:
        """The end in this piece, after which is `text`; None if the value goes on."""
        for place, character in enumerate(text, 1):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
                continue
            self._in_string = character == '"'
            self._depth += (character in "{[") - (character in "}]")
            if self._depth == 0:
                return _END.match(text, place), place
        return None, len(text)


def first_word(marker: str) -> str:
    """What a marker begins with, up to white space or `…`; empty if it has no words."""
    return next(iter(marker.replace(ANY, " ").split()), "")


def pattern_of(marker: str) -> str:
    """A pattern of a marker, whose words may have any white space before them."""
    first, *others = (list(map(regex.escape, part.replace("><", "> <").split())) for part in marker.split(ANY))
    pattern = "".join(rf"\s*{word}" for word in first)
    for word, *more in filter(None, others):
        # Any text goes up to the first such word.
        pattern += rf"(?>[^\n]{{0,80}}?{word})" + "".join(rf"\s*{word}" for word in more)
    return pattern


def closings_of(marker: str) -> list[str]:
    """A closing marker, and its beginning without the token that ends the turn; none if there is no marker."""
    found = _LAST.match(marker)
    return [marker, *([found[1]] if found else [])] if marker.strip() else []


def either(texts: Sequence[str]) -> str:
    """A pattern of one of some texts, the longest that there is."""
    return "|".join(map(regex.escape, sorted(texts, key=len, reverse=True)))


@functools.lru_cache(maxsize=1024)
def _compiled(marker: str) -> regex.Pattern[str]:
    return regex.compile(pattern_of(marker))


@functools.lru_cache(maxsize=64)
def _strings_of(quote: str) -> regex.Pattern[str]:
    """A pattern of a text in quotes, or between tokens."""
    token = regex.escape(quote) if len(quote) > 1 else "(?!)"
    inside = "|".join(rf"{mark}(?P<said>(?:[^\\{mark}]++|\\.)*+){mark}" for mark in "\"'")
    return regex.compile(rf"\s*(?:{token}(?P<raw>.*?){token}|{inside})", regex.DOTALL)


def _scalar(word: str) -> Any:
    if word in LITERALS:
        return LITERALS[word]
    for read in () if word[0].isalpha() else (int, float):
        with contextlib.suppress(ValueError):
            return read(word)
    raise Unreadable(word)


def _unescaped(body: str) -> str:
    """What a string says. The halves of a surrogate pair make one character."""
    text: str = _ESCAPE.sub(_escape, body)
    return text if text == body else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _escape(match: regex.Match[str]) -> str:
    text: str = match[1]
    if text[0] in "ux" and len(text) > 1:
        return chr(int(text[1:], 16))
    return _ESCAPED.get(text, text if text in "\\'\"/" else match[0])
