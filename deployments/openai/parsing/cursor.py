"""Reads a text that may go on: markers, and values as models write them, in JSON, Python or a dialect of these."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import regex

ANY = "…"
"""In a marker: any short text on one line."""
FENCE = r"```(?:json|\w{0,20}(?:tool|call|function)\w{0,20})?(?!\w)"
"""A pattern of what begins a block of Markdown that may hold calls."""
_STRINGS = {quote: regex.compile(rf"((?:[^\\{quote}]++|\\.)*+){quote}", regex.DOTALL) for quote in "\"'"}
LITERALS: dict[str, Any] = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
LITERALS |= {"NaN": math.nan, "Infinity": math.inf}
"""The words that are values."""
_SCALAR = regex.compile(r"[-+.\w]+")
_KEY = regex.compile(r"[^\W\d][\w.\-]*")
_SPACE = regex.compile(r"\s*+")
_ESCAPE = regex.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", regex.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
# A token that closes, and another one after it.
_LAST = regex.compile(r"(\s*<[^<>\s]*(?:/|end|END|close|suffix|tool_call\|)[^<>\s]*>)\s*<[^<>\s]+>\s*\Z")
_DECODER = json.JSONDecoder(strict=False)
_DEEPEST = 64
# Of what a pattern matches.
_LONGEST = 512
_Item = TypeVar("_Item")


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
        self._quotes = (quote, *_STRINGS) if quote else tuple(_STRINGS)
        self.text = text
        self.place = place
        self.final = final

    @property
    def at_end(self) -> bool:
        """Whether only white space is left of a text that is final."""
        return self.final and not self.text[self.place :].strip()

    def take(self, pattern: regex.Pattern[str]) -> regex.Match[str] | None:
        """Take what matches, if anything does; what more text could make a match is incomplete."""
        found = pattern.match(self.text, self.place, partial=not self.final)
        if found is not None and found.partial:
            raise Incomplete
        self.place = self.place if found is None else found.end()
        return found

    def match(self, pattern: regex.Pattern[str]) -> str:
        """Take what has to match, after white space; a match that more text could prolong is incomplete."""
        self.take(_SPACE)
        found = self.take(pattern)
        if found is None:
            raise Unreadable(pattern.pattern)
        if self.place == len(self.text) and not self.final:
            raise Incomplete
        return str(found[0])

    def maybe(self, marker: str) -> bool:
        """Take a marker if the text goes on with it. White space around its words is free."""
        return self.take(_compiled(marker)) is not None

    def expect(self, marker: str) -> None:
        """Take a marker."""
        if not self.maybe(marker):
            raise Unreadable(marker)

    def closing(self, marker: str) -> bool:
        """Take a closing marker, or its beginning without the token that ends the turn."""
        if not marker.strip() or self.maybe(marker):
            return bool(marker.strip())
        found = _LAST.match(marker)
        return found is not None and self.maybe(found[1])

    def first(self, *words: str) -> int:
        """The place of the first of some words."""
        places = [place for each in words if (place := self.text.find(each, self.place)) >= 0]
        if not places:
            raise Unreadable("the end") if self.final else Incomplete
        return min(places)

    def until(self, word: str) -> str:
        """The text up to a word, which is taken as well."""
        start, end = self.place, self.first(word)
        self.place = end + len(word)
        return self.text[start:end]

    def value(self, depth: int = 0) -> Any:
        """A JSON value. Python's literals, tuples, single quotes, bare keys and a last comma are read as well."""
        self.take(_SPACE)
        start = self.text[self.place : self.place + 1]
        if depth > _DEEPEST:
            raise Unreadable("nested too deep")
        if (text := self._string()) is not None:
            return text
        if start and start in "{[(":
            return self._container(start, depth + 1)
        return _scalar(self.match(_SCALAR))

    def items(self, end: str, read: Callable[[], _Item]) -> list[_Item]:
        """What stands between commas up to an end, which is taken as well."""
        found = []
        while not self.maybe(end):
            found.append(read())
            if not self.maybe(","):
                self.expect(end)
                break
        return found

    def pair(self, key: regex.Pattern[str], sign: str, depth: int = 0) -> tuple[str, Any]:
        """A key, bare or in quotes, the sign after it, and a value."""
        text = self._string()
        name = self.match(key) if text is None else text
        self.expect(sign)
        return name, self.value(depth)

    def _container(self, start: str, depth: int) -> Any:
        try:
            value, self.place = _DECODER.raw_decode(self.text, self.place)
            return value
        except (ValueError, RecursionError):
            self.place += 1
        if start == "{":
            return dict(self.items("}", lambda: self.pair(_KEY, ":", depth)))
        return self.items("]" if start == "[" else ")", lambda: self.value(depth))

    def _string(self) -> str | None:
        """A text in quotes; None if no quote begins here."""
        quote = next((quote for quote in self._quotes if self.maybe(quote)), None)
        if quote is None or len(quote) > 1:
            return quote and self.until(quote)
        found = self.take(_STRINGS[quote])
        if found is None:
            raise Unreadable("the end")
        return _unescaped(found[1])


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

    def next(self, text: str, final: bool) -> tuple[regex.Match[str] | None, int]:
        """The next match, if it is certain, and up to where it is certain that there is none."""
        found = self.pattern.search(text)
        place = len(text) if found is None else found.start()
        if not final and len(text) - place < _LONGEST:
            tail = self._tail.search(text, max(0, len(text) - _LONGEST), partial=True)
            if tail is not None and tail.start() <= place:
                return None, tail.start()
        return found, place


class JsonEnd:
    """Finds the end of an object or list that is fed in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, piece: str) -> int | None:
        """The place in this piece after which the value has ended; None if it goes on."""
        for place, character in enumerate(piece):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
                continue
            self._in_string = character == '"'
            self._depth += (character in "{[") - (character in "}]")
            if self._depth == 0:
                return place + 1
        return None


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


def either(texts: Sequence[str]) -> str:
    """A pattern of one of some texts, the longest that there is."""
    return "|".join(map(regex.escape, sorted(texts, key=len, reverse=True)))


@functools.lru_cache(maxsize=1024)
def _compiled(marker: str) -> regex.Pattern[str]:
    return regex.compile(pattern_of(marker))


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
