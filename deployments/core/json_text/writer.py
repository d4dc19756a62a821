"""A writer of large JSON texts that lets other threads run in between.

A call of `json.dumps` holds Python's lock until the whole text is written. Here one call writes some kilobytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from deployments.core.token_ids import TokenIds

_MOST = 2000
_LETTERS = 1 << 16
_SCALARS = {int, float, bool, type(None)}
_CONTAINERS = (dict, list, tuple, TokenIds)


class JsonWriter:
    """Writes compact JSON, as `json.dumps` does with `separators=(",", ":")`.

    Args:
        ascii: escape all other characters.
        nan: write NaN and the infinities, as Python does.
        errors: what `data` does with half a surrogate pair, see `str.encode`.
        default: a JSON value in place of an object that is not one; `TokenIds` are lists.
    """

    def __init__(
        self,
        *,
        ascii: bool = False,
        nan: bool = False,
        errors: str = "strict",
        default: Callable[[Any], Any] | None = None,
    ) -> None:
        self._default = default
        self._errors = errors
        self._encode = json.JSONEncoder(
            ensure_ascii=ascii, separators=(",", ":"), allow_nan=nan, default=self._plain
        ).encode

    def text(self, value: Any, limit: int | None = None) -> str | None:
        """The JSON text of a value; None if it is longer than `limit` characters, which is found before all of it is
        written.

        Raises:
            TypeError, ValueError: a value in it is not one of JSON.
        """
        pieces, length = [], 0
        for piece in self._pieces(value):
            pieces.append(piece)
            length += len(piece)
            if limit is not None and length > limit:
                return None
        return "".join(pieces)

    def is_small(self, value: Any) -> bool:
        """Whether a value may be written at once; found without going through all of a large one."""
        return _left(value, _MOST) >= 0

    def small(self, value: Any) -> bytes:
        """The same of a value that is not large, at once."""
        return self._encode(value).encode("utf-8", self._errors)

    def data(self, value: Any) -> bytes:
        """The same as UTF-8."""
        return b"".join(piece.encode("utf-8", self._errors) for piece in self._pieces(value))

    def _pieces(self, value: Any) -> Iterator[str]:
        if self.is_small(value):
            yield self._encode(value)
        elif isinstance(value, str):
            yield '"'
            yield from (self._encode(value[i : i + _LETTERS])[1:-1] for i in range(0, len(value), _LETTERS))
            yield '"'
        elif isinstance(value, dict):
            yield "{"
            for index, (key, item) in enumerate(value.items()):
                yield ("," if index else "") + self._encode({key: 0})[1:-2]
                yield from self._pieces(item)
            yield "}"
        elif isinstance(value, TokenIds):
            yield "[" + ",".join(map(str, value[:_MOST]))
            yield from ("," + ",".join(map(str, value[i : i + _MOST])) for i in range(_MOST, len(value), _MOST))
            yield "]"
        elif isinstance(value, list | tuple):
            yield from self._items(value)
        else:
            yield from self._pieces(self._plain(value))

    def _items(self, values: Iterable[Any]) -> Iterator[str]:
        """An array: small items together, large ones in pieces."""
        mark = "["
        for items in _batches(values):
            yield mark
            yield from self._pieces(items[0]) if len(items) == 1 else [self._encode(items)[1:-1]]
            mark = ","
        yield "]"

    def _plain(self, value: Any) -> Any:
        if isinstance(value, TokenIds):
            return list(value)
        if self._default is None:
            raise TypeError(f"{type(value).__name__} is not a JSON value")
        return self._default(value)


def _batches(values: Iterable[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    left = _MOST
    for value in values:
        left = _left(value, left)
        if left < 0 and batch:
            yield batch
            batch, left = [], _left(value, _MOST)
        batch.append(value)
    if batch:
        yield batch


def _left(value: Any, left: int) -> int:
    """What is left of a budget of values after this one; negative if it is used up, or what it takes is not known."""
    kind = type(value)
    if kind in _SCALARS:
        return left - 1
    if kind is str:
        return left - 1 - len(value) // 64
    if not isinstance(value, _CONTAINERS) or len(value) > left:
        return -1
    for item in value.values() if isinstance(value, dict) else value:
        left = _left(item, left) - 1
        if left < 0:
            break
    return left
