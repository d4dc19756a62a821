"""A parser for large JSON texts that lets other threads run in between.

A call of `json.loads` holds Python's lock until the whole text is read, seconds for some texts. Here the large arrays
and objects are walked in Python, and only pieces of a few kilobytes are read by one call.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

_scan_string: Any = vars(json.decoder)["scanstring"]
_PIECE = 4096
_RUN = 1 << 15
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALARS = re.compile(r'(?:[-+0-9.eE, \t\n\r]+|"[^"\\]*",)*')
_DIGITS = re.compile(r"[-+0-9.eE]+")
_LETTERS = 1 << 16
_MARK = codecs.BOM_UTF8.decode("latin-1")
MAX_LETTERS = 1 << 24
"""Of a string that is not ASCII: a letter can take four bytes, and Python's lock is held while it is put together."""
# A part of a string, up to the quote after it: it ends between two escapes.
_PART = re.compile(r'(?:[^"\\]++|\\[^u]|\\u.{4})*+', re.DOTALL)


class TooManyObjects(ValueError):
    """The text has more objects and arrays than the limit."""


class TooManyKeys(ValueError):
    """An object has more keys than the limit."""


class TooDeep(ValueError):
    """Objects and arrays are nested too deeply."""


class JsonReader:
    """Reads one text.

    Args:
        raw: the text in UTF-8. Its bytes are walked as the letters of Latin-1, and decoded piece by piece: all of it as
            one `str` may be four times as large.
        decoder: a `json.JSONDecoder`, how scalars and small values are read.
        max_depth: of nested objects and arrays.
        max_objects: objects and arrays together.
        max_keys: of one object. Python's lock is held while a dictionary grows.
        check: called with every piece that was read.
    """

    def __init__(
        self,
        raw: bytes | bytearray,
        decoder: Any,
        *,
        max_depth: int,
        max_objects: int,
        max_keys: int,
        check: Callable[[Any], None] | None = None,
    ) -> None:
        self._text = raw.decode("latin-1")
        self._scan = decoder.scan_once
        self._max_depth = max_depth
        self._left = max_objects
        self._max_keys = max_keys
        self._check = check or _no_check

    def read(self) -> Any:
        """The value of the whole text.

        Raises:
            json.JSONDecodeError: it is not JSON; `pos` counts bytes.
            UnicodeDecodeError: it is not UTF-8.
            TooManyObjects, TooManyKeys, TooDeep: it is beyond the limits.
            ValueError: the decoder refuses a number or a name.
        """
        begin = self._skip(len(_MARK) if self._text.startswith(_MARK) else 0)
        if begin == len(self._text):
            raise ValueError("the body is empty")
        value, end = self._value(begin, 1)
        if end != len(self._text):
            raise json.JSONDecodeError("Extra data", self._text, end)
        return value

    def _value(self, at: int, depth: int) -> tuple[Any, int]:
        """The value that begins at a place, and where the next thing begins."""
        first = self._text[at : at + 1]
        value: Any
        if first == '"':
            value, end = self._string(at)
        elif first not in ("[", "{"):
            value, end = self._scalar(at)
        elif (small := self._small(at, depth)) is not None:
            value, end = small
        else:
            self._count(1, depth)
            value, end = (self._array if first == "[" else self._object)(at + 1, depth)
        return value, self._skip(end)

    def _string(self, at: int) -> tuple[str, int]:
        """A string, in parts if it is long."""
        end = self._text.find('"', at + 1, at + _PIECE)
        if end >= 0 and self._text[end - 1] != "\\":
            value, end = self._part(at + 1, end), end + 1
            self._check(value)
            return value, end
        parts: list[str] = []
        at += 1
        while True:
            end = _PART.match(self._text, at, at + _LETTERS).end()  # type: ignore[union-attr]  # it matches ""
            closes = self._text[end : end + 1] == '"'
            if not closes and end < at + _LETTERS - 6:
                end = len(self._text)  # What comes next is not a part of a string.
            while "\x80" <= self._text[end : end + 1] < "\xc0":
                end -= 1  # It is in the middle of a character.
            parts.append(self._part(at, end))
            if closes:
                break
            at = end
        value = _joined(parts)
        self._check(value)
        return value, end + 1

    def _part(self, at: int, end: int) -> str:
        try:
            return str(_scan_string(self._decoded(at, end, whole=True) + '"', 0, True)[0])
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(error.msg, self._text, at + error.pos) from None

    def _scalar(self, at: int) -> tuple[Any, int]:
        digits = _DIGITS.match(self._text, at, at + _PIECE)
        if digits is not None and digits.end() == at + _PIECE:
            raise json.JSONDecodeError(f"A number has more than {_PIECE} digits", self._text, at)
        try:
            value, end = self._scan(self._text, at)
        except StopIteration as stop:
            raise json.JSONDecodeError("Expecting value", self._text, stop.value) from None
        self._check(value)
        return value, end

    def _small(self, at: int, depth: int) -> tuple[Any, int] | None:
        """An array or object that ends within a piece; None if it does not, or something is wrong with it."""
        try:
            piece = self._decoded(at, at + _PIECE)
            value, length = self._scan(piece, 0)
        except (ValueError, StopIteration, RecursionError):
            return None  # Read in parts, which finds what is wrong and where.
        level = [value]
        if piece.count("[", 0, length) + piece.count("{", 0, length) == 1:
            self._count(1, depth)
            level = []
        while level:
            self._count(len(level), depth)
            depth += 1
            level = [item for holder in level for item in _items(holder) if isinstance(item, dict | list)]
        self._check(value)
        return value, at + (length if piece.isascii() else len(piece[:length].encode()))

    def _array(self, at: int, depth: int) -> tuple[list[Any], int]:
        values: list[Any] = []
        at = self._skip(at)
        if self._text[at : at + 1] == "]":
            return values, at + 1
        while True:
            scalars, at = self._scalars(at)
            values += scalars
            value, at = self._value(at, depth + 1)
            values.append(value)
            mark = self._text[at : at + 1]
            if mark == "]":
                return values, at + 1
            if mark != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, at)
            at = self._skip(at + 1)

    def _scalars(self, at: int) -> tuple[list[Any], int]:
        """The next numbers and strings of an array, and where the rest begins; none if few or other things come."""
        found = _SCALARS.match(self._text, at, at + _RUN)
        comma = self._text.rfind(",", at, found.end() if found else at)
        if comma - at < 64:
            return [], at
        try:
            values, _ = self._scan(f"[{self._decoded(at, comma, whole=True)}]", 0)
        except (ValueError, StopIteration):
            return [], at
        self._check(values)
        return values, self._skip(comma + 1)

    def _object(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        at = self._skip(at)
        if self._text[at : at + 1] == "}":
            return values, at + 1
        while True:
            if self._text[at : at + 1] != '"':
                message = "Expecting property name enclosed in double quotes"
                raise json.JSONDecodeError(message, self._text, at)
            key, at = self._string(at)
            at = self._skip(at)
            if self._text[at : at + 1] != ":":
                raise json.JSONDecodeError("Expecting ':' delimiter", self._text, at)
            values[key], at = self._value(self._skip(at + 1), depth + 1)
            if len(values) > self._max_keys:
                raise TooManyKeys
            mark = self._text[at : at + 1]
            if mark == "}":
                return values, at + 1
            if mark != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, at)
            at = self._skip(at + 1)

    def _decoded(self, at: int, end: int, *, whole: bool = False) -> str:
        """A piece of the text as it is; if it is not whole, without the beginning of a character at its end."""
        piece = self._text[at:end]
        if piece.isascii():
            return piece
        try:
            return codecs.utf_8_decode(piece.encode("latin-1"), "strict", whole)[0]
        except UnicodeDecodeError as error:
            raise UnicodeDecodeError("utf-8", error.object, at + error.start, at + error.end, error.reason) from None

    def _skip(self, at: int) -> int:
        """Where the next thing after white space begins."""
        while (end := _SPACE.match(self._text, at, at + _LETTERS).end()) == at + _LETTERS:  # type: ignore[union-attr]
            at = end
        return end

    def _count(self, objects: int, depth: int) -> None:
        if depth > self._max_depth:
            raise TooDeep
        self._left -= objects
        if self._left < 0:
            raise TooManyObjects


def _joined(parts: list[str]) -> str:
    """The parts of a string; the halves of a surrogate pair can be in two of them.

    Raises:
        ValueError: it is too long.
    """
    if sum(map(len, parts)) > MAX_LETTERS and not all(map(str.isascii, parts)):
        raise ValueError(f"a string in it has more than {MAX_LETTERS} characters, and not all of them are ASCII")
    for index in range(1, len(parts)):
        high, low = parts[index - 1][-1:], parts[index][:1]
        if "\ud800" <= high <= "\udbff" and "\udc00" <= low <= "\udfff":
            pair = (high + low).encode("utf-16", "surrogatepass").decode("utf-16")
            parts[index - 1] = parts[index - 1][:-1] + pair
            parts[index] = parts[index][1:]
    return "".join(parts)


def _no_check(piece: Any) -> None:
    """Nothing is wrong with it."""


def _items(holder: Any) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder
