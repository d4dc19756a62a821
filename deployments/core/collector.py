"""Python's garbage collector beside large requests.

It walks all objects, with Python's lock held: hundreds of thousands of parts of one request are a good part of a
second, in which no other request goes on. They have no cycles, so nothing is lost if it leaves them alone.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_PART = 4096


class _Collector:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._working = 0
        self._requests = 0
        self._frozen = False
        self._enabled = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self._lock:
            if not self._working:
                self._enabled = gc.isenabled()
            self._working += 1
            gc.disable()
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1
                if self._requests:
                    gc.freeze()
                    self._frozen = True
                if not self._working and self._enabled:
                    gc.enable()

    @contextmanager
    def kept(self) -> Iterator[None]:
        with self._lock:
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1
                if not self._requests:
                    self._thaw()

    def collect(self) -> None:
        with self._lock:
            self._thaw()
        gc.collect()

    def _thaw(self) -> None:
        if self._frozen:
            gc.unfreeze()
            self._frozen = False


_COLLECTOR = _Collector()


def without_collector(function: Callable[[], T]) -> T:
    """The function's result. While it runs nothing is collected; what it has made is not walked while a large request
    is kept (see `large_request`).
    """
    with _COLLECTOR.paused():
        return function()


def large_request() -> AbstractContextManager[None]:
    """While a request is answered whose objects the collector should not walk. They are left to it after the last
    one.
    """
    return _COLLECTOR.kept()


def collect() -> None:
    """A full collection of all objects, those of large requests included."""
    _COLLECTOR.collect()


def leave_imports() -> None:
    """Leave what there is now out of all collections, until the first large request has ended.

    Modules are most of it: a full collection, as at each unload of a model, walks them for a fifth of a second. For a
    process of our own, before it has anything that is to be freed.
    """
    gc.collect()
    gc.freeze()


def let_go(values: list[Any]) -> None:
    """Empty a list of JSON values, in steps: to forget a large one at once holds Python's lock too.

    What others refer to as well stays as it is.
    """
    while values:
        value = values.pop()
        if type(value) not in (list, dict) or sys.getrefcount(value) > _ONLY_HERE:
            continue
        while value:
            if isinstance(value, dict):
                part = [value.popitem()[1] for _ in range(min(len(value), _PART))]
            else:
                part = value[-_PART:]
                del value[-_PART:]
            values.extend(item for item in part if type(item) in (list, dict))
            del part


_ONLY_HERE = 2
"""`sys.getrefcount` of what one variable alone refers to."""
