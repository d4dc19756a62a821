"""Large calls on their way to a replica: pickled by a thread that lets others run, in parts that are read one by one.

One call of `pickle` holds Python's lock until all is written or read. For megabytes of messages that is a good part of
a second, in which no other request's tokens move.
"""

from __future__ import annotations

import io
import pickle
from array import array
from dataclasses import dataclass
from functools import cache
from typing import Any

from deployments.core.calls import LARGE, TokensPrompt
from deployments.host.worker import Worker

_LEVELS = 2
_IDS = 1 << 14


@dataclass(frozen=True, slots=True)
class Packed:
    """What `pack` has made of a value."""

    data: bytes


async def packed(value: Any) -> Any:
    """A value of a large request as a `Packed`, any other as it is."""
    return await _worker("packing").run(lambda: pack(value)) if LARGE.get() else value


async def unpacked(value: Any) -> Any:
    """What was packed, or the value itself."""
    return await _worker("unpacking").run(lambda: unpack(value)) if isinstance(value, Packed) else value


def pack(value: Any) -> Packed:
    """A value, pickled in parts."""
    return Packed(_dumps(value, _LEVELS))


def unpack(given: Packed) -> Any:
    """The value that was packed."""
    return _Unpickler(io.BytesIO(given.data)).load()


def _dumps(value: Any, levels: int) -> bytes:
    data = io.BytesIO()
    _Pickler(data, levels).dump(value)
    return data.getvalue()


class _Pickler(pickle.Pickler):
    """Objects and token ids become pickles in the pickle.

    That its method is called for every value is what lets other threads run.
    """

    def __init__(self, file: io.BytesIO, levels: int) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._levels = levels
        self._outermost = True

    def persistent_id(self, value: Any) -> Any:
        if type(value) is TokensPrompt:
            return _id_bytes(value.token_ids)
        if type(value) is dict and self._levels and not self._outermost:
            return ("dict", _dumps(value, self._levels - 1))
        self._outermost = False
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, found: Any) -> Any:
        if isinstance(found, bytes):
            return TokensPrompt(token_ids=tuple(array("i", found)))
        return _Unpickler(io.BytesIO(found[1])).load()


def _id_bytes(ids: tuple[int, ...]) -> bytes:
    """Token ids as C ints."""
    return b"".join(array("i", ids[i : i + _IDS]).tobytes() for i in range(0, len(ids), _IDS))


@cache
def _worker(name: str) -> Worker:
    return Worker(name)
