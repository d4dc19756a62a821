"""Large values on their way to a replica and back: pickled by threads that let others run.

One call of `pickle` holds Python's lock until all is written or read. For megabytes of messages that is a good part of
a second, in which no other request's tokens move.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from deployments.core.calls import LARGE
from deployments.core.client import Rendered
from deployments.core.collector import without_collector
from deployments.core.events import Accepted, Delta, PromptScores
from deployments.core.logprobs import TokenLogprob
from deployments.host.worker import Worker

_EVERY = 256
_LETTERS = 1 << 20
_ITEMS = 1000
_MANY = 5_000


@dataclass(frozen=True, slots=True)
class Packed:
    """What `pack` has made of a value."""

    data: bytes


async def packed(value: Any) -> Any:
    """A value of a large request as a `Packed`, any other as it is."""
    return await _aside("packing", pack, value) if LARGE.get() else value


async def packed_answer(value: Any) -> Any:
    """A value of a large answer as a `Packed`, any other as it is."""
    return await _aside("packing", pack, value) if _weight(value) > _MANY else value


async def unpacked(value: Any) -> Any:
    """What was packed, or the value itself."""
    return await _aside("unpacking", unpack, value) if isinstance(value, Packed) else value


def pack(value: Any) -> Packed:
    """A value, pickled in parts."""
    return Packed(_dumps(value))


def unpack(given: Packed) -> Any:
    """The value that was packed."""
    return _loads(given.data)


def _dumps(value: Any) -> bytes:
    data = io.BytesIO()
    _Pickler(data, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return data.getvalue()


def _loads(data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data)).load()


class _Pickler(pickle.Pickler):
    """Leaves some values to methods of the unpickler: that both call Python now and then is what lets others run.

    Long lists are pickles in the pickle, each with a memo of its own: a memo of millions is slow to grow.
    """

    _passed = 0

    def persistent_id(self, value: Any) -> Any:
        kind = type(value)
        if kind is str and len(value) > _LETTERS:
            return "text", [value[i : i + _LETTERS] for i in range(0, len(value), _LETTERS)]
        if kind in (list, tuple) and len(value) > _ITEMS:
            return kind.__name__, [_dumps(value[i : i + _ITEMS]) for i in range(0, len(value), _ITEMS)]
        self._passed += 1
        if self._passed >= _EVERY and (kind in (str, int, float) or (kind in (list, dict) and not value)):
            self._passed = 0
            return "value", value
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, found: Any) -> Any:
        kind, value = found
        if kind == "text":
            return "".join(value)
        if kind in ("list", "tuple"):
            items = [item for part in value for item in _loads(part)]
            return items if kind == "list" else tuple(items)
        return value


def _weight(value: Any) -> int:
    """About how many objects are to be made of an answer at the other end."""
    match value:
        case list() | tuple():
            return len(value) if len(value) > _MANY else len(value) + sum(map(_weight, value))
        case Accepted():
            return sum(map(_length, value.prompt_texts))
        case Rendered():
            return _length(value.text)
        case PromptScores():
            return _scored(value.scores[-1:], len(value.scores))
        case Delta():
            return _scored((value.logprobs or ())[-1:], len(value.logprobs or ())) + _length(value.text)
    return 0


def _length(text: str | None) -> int:
    return 0 if text is None else len(text) // 1024


def _scored(last: Sequence[TokenLogprob | None], count: int) -> int:
    return sum(count * (1 + len(token.top)) for token in last if token is not None)


async def _aside(name: str, function: Any, value: Any) -> Any:
    return await _worker(name).run(lambda: without_collector(lambda: function(value)))


@cache
def _worker(name: str) -> Worker:
    return Worker(name)
