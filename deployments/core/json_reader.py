"""A parser for large JSON texts that lets other threads run in between.

A call of `json.loads` holds Python's lock until the whole text is read, seconds for some texts. Here the large arrays
and objects are walked in Python, and only pieces of a few kilobytes are read by one call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

_scan_string: Any = vars(json.decoder)["scanstring"]
_PIECE = 4096
_RUN = 1 << 15
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALARS = re.compile(r'(?:[-+0-9.eE, \t\n\r]+|"[^"\\]*",)*')


class TooManyObjects(ValueError):
    """The text has more objects and arrays than the limit."""


class TooDeep(ValueError):
    """Objects and arrays are nested too deeply."""


class JsonReader:
    """Reads one text.

    Args:
        decoder: a `json.JSONDecoder`, how scalars and small values are read.
        max_depth: of nested objects and arrays.
        max_objects: objects and arrays together. Python's garbage collector walks all of them, with its lock held.
        check: called with every piece that was read.
    """

    def __init__(
        self,
        text: str,
        decoder: Any,
        *,
        max_depth: int,
        max_objects: int,
        check: Callable[[Any], None] | None = None,
    ) -> None:
        self._text = text
        self._scan = decoder.scan_once
        self._max_depth = max_depth
        self._left = max_objects
        self._check = check or _no_check

    def read(self) -> Any:
        """The value of the whole text.

        Raises:
            json.JSONDecodeError: it is not JSON.
            TooManyObjects, TooDeep: it is beyond the limits.
            ValueError: the decoder refuses a number or a name.
        """
        value, end = self._value(self._skip(0), 1)
        if end != len(self._text):
            raise json.JSONDecodeError("Extra data", self._text, end)
        return value

    def _value(self, at: int, depth: int) -> tuple[Any, int]:
        """The value that begins at a place, and where the next thing begins."""
        first = self._text[at : at + 1]
        if first not in ("[", "{"):
            value, end = self._scalar(at)
        elif (small := self._small(at, depth)) is not None:
            value, end = small
        else:
            self._count(1, depth)
            value, end = (self._array if first == "[" else self._object)(at + 1, depth)
        return value, self._skip(end)

    def _scalar(self, at: int) -> tuple[Any, int]:
        try:
            value, end = self._scan(self._text, at)
        except StopIteration as stop:
            raise json.JSONDecodeError("Expecting value", self._text, stop.value) from None
        self._check(value)
        return value, end

    def _small(self, at: int, depth: int) -> tuple[Any, int] | None:
        """An array or object that ends within a piece; None if it does not, or something is wrong with it."""
        piece = self._text[at : at + _PIECE]
        try:
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
        return value, at + length

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
            values, _ = self._scan(f"[{self._text[at:comma]}]", 0)
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
            key, at = _scan_string(self._text, at + 1, True)
            self._check(key)
            at = self._skip(at)
            if self._text[at : at + 1] != ":":
                raise json.JSONDecodeError("Expecting ':' delimiter", self._text, at)
            values[key], at = self._value(self._skip(at + 1), depth + 1)
            mark = self._text[at : at + 1]
            if mark == "}":
                return values, at + 1
            if mark != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, at)
            at = self._skip(at + 1)

    def _skip(self, at: int) -> int:
        """Where the next thing after white space begins."""
        found = _SPACE.match(self._text, at)
        return at if found is None else found.end()

    def _count(self, objects: int, depth: int) -> None:
        if depth > self._max_depth:
            raise TooDeep
        self._left -= objects
        if self._left < 0:
            raise TooManyObjects


def _no_check(piece: Any) -> None:
    """Nothing is wrong with it."""


def _items(holder: Any) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder
