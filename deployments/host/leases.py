"""Which models are loaded: in-use counts, least recently used eviction, one load at a time per model.

A request holds a lease while it computes. A leased model is never unloaded. A model that is not loaded takes a free
place, else the place of the least recently used idle model; where all are busy the request waits, and after
`patience` seconds the least recently used one takes no new leases until its place has changed hands, so that steady
traffic for one model cannot starve another. Loads are shared by all who wait and outlive a waiter that gives up. A
model whose load runs out of memory beside others is loaded again with fewer of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from deployments.core.errors import ModelLoadFailed, OutOfMemory, TroupeError, Unavailable, last_line

logger = logging.getLogger("troupe.leases")

T = TypeVar("T")


@dataclass(slots=True)
class _Place(Generic[T]):
    """A loaded value and how many requests use it."""

    value: T
    leases: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    idle_since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class LeaseStats:
    """What is held, and counters since the start.

    `in_use` is the number of leases of each loaded key, `failed` the error of each key whose last load failed.
    """

    loaded: tuple[str, ...]
    loading: tuple[str, ...]
    leases: int
    waiting: int
    loads: int
    failures: int
    evictions: int
    in_use: dict[str, int] = field(default_factory=dict)
    failed: dict[str, TroupeError] = field(default_factory=dict)

    @property
    def counters(self) -> dict[str, int]:
        """What waits, and what has happened since the start, as a replica reports them."""
        return {
            "waiting": self.waiting,
            "loads": self.loads,
            "load_failures": self.failures,
            "evictions": self.evictions,
        }


class Leases(Generic[T]):
    """At most `capacity` values of `load(key)`, each leased by any number of requests at once.

    All methods belong to one event loop.

    Args:
        load: makes the value; run once per key however many wait. Its error is given to all who wait.
        unload: ends a value that nobody leases; awaited before the place is used again.
        capacity: values held or being loaded at the same time.
        patience: seconds until a waiter makes the least recently used busy value drain.
        retry_after: seconds for which a failed load's error is given again instead of loading anew.
        idle_limit: seconds after which a value that nobody leases is unloaded; None keeps it.
    """

    def __init__(
        self,
        load: Callable[[str], Awaitable[T]],
        unload: Callable[[str, T], Awaitable[None]],
        *,
        capacity: int,
        patience: float = 2.0,
        retry_after: Callable[[str], float] = lambda key: 60.0,
        idle_limit: Callable[[str], float | None] = lambda key: None,
    ) -> None:
        self._load = load
        self._unload = unload
        self._capacity = capacity
        self._patience = patience
        self._retry_after = retry_after
        self._idle_limit = idle_limit
        self._most_others: dict[str, int] = {}
        self._places: OrderedDict[str, _Place[T]] = OrderedDict()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._unloading: set[asyncio.Task[None]] = set()
        self._failed: dict[str, tuple[float, TroupeError]] = {}
        self._queue: OrderedDict[str, int] = OrderedDict()
        self._changed = asyncio.Event()
        self._pinned: set[str] = set()
        self._closed = False
        self.loads = self.failures = self.evictions = 0

    @contextlib.asynccontextmanager
    async def lease(self, key: str) -> AsyncIterator[T]:
        """The value of a key, loaded if need be, kept until the block ends.

        Raises:
            TroupeError: the load failed, now or less than `retry_after` seconds ago, or the leases are closed.
        """
        place = await self._acquire(key)
        try:
            yield place.value
        finally:
            place.leases -= 1
            if place.leases == 0:
                self._became_idle(key, place)

    def pin(self, key: str) -> None:
        """Never evict this key."""
        self._pinned.add(key)

    def retire(self, key: str) -> None:
        """Unload a key that nobody asks for any more, once nobody leases it."""
        self._pinned.discard(key)
        if key in self._places:
            self._start_unload(key)

    def stats(self) -> LeaseStats:
        """Counters at this moment."""
        return LeaseStats(
            loaded=tuple(self._places),
            loading=tuple(self._loading),
            leases=sum(place.leases for place in self._places.values()),
            waiting=sum(self._queue.values()),
            loads=self.loads,
            failures=self.failures,
            evictions=self.evictions,
            in_use={key: place.leases for key, place in self._places.items()},
            failed={key: error for key, (_, error) in self._failed.items()},
        )

    def values(self) -> dict[str, T]:
        """The loaded values by key."""
        return {key: place.value for key, place in self._places.items()}

    async def evict(self, key: str) -> bool:
        """Unload a key once nobody leases it; False if it is not loaded. Later requests load it anew."""
        if key not in self._places:
            return False
        await asyncio.shield(self._start_unload(key))  # a caller that gives up must not leave it half unloaded
        return True

    async def close(self, grace: float = 30.0) -> None:
        """Take no new leases, wait up to `grace` seconds for those held, unload everything."""
        self._closed = True
        self._wake()
        for task in self._loading.values():
            task.cancel()
        busy = [place.idle.wait() for place in self._places.values() if place.leases]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*busy), grace)
        for place in self._places.values():
            place.idle.set()
        for key in list(self._places):
            self._start_unload(key)
        if self._unloading:
            await asyncio.wait(self._unloading)

    def _became_idle(self, key: str, place: _Place[T]) -> None:
        place.idle.set()
        place.idle_since = time.monotonic()
        limit = self._idle_limit(key)
        if limit is not None and key not in self._pinned:
            asyncio.get_running_loop().call_later(limit, self._unload_if_idle, key, place, limit)
        self._wake()

    def _unload_if_idle(self, key: str, place: _Place[T], limit: float) -> None:
        unused = time.monotonic() - place.idle_since + 0.01 >= limit and not place.leases and key not in self._queue
        if unused and self._places.get(key) is place:
            logger.info("%s was not asked for in %g s", key, limit)
            self._start_unload(key)

    async def _acquire(self, key: str) -> _Place[T]:
        self._queue[key] = self._queue.get(key, 0) + 1
        since = time.monotonic()
        try:
            while (place := self._try(key, since)) is None:
                patience = since + self._patience - time.monotonic()
                if patience <= 0:
                    self._drain_for(key)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), patience if patience > 0 else None)
            return place
        finally:
            self._queue[key] -= 1
            if not self._queue[key]:
                del self._queue[key]

    def _try(self, key: str, since: float) -> _Place[T] | None:
        """A lease now, or None; starts the load, or the eviction it needs, where possible."""
        if self._closed:
            raise Unavailable("The server is shutting down.", retry_after=5)
        place = self._places.get(key)
        if place is not None:
            place.leases += 1
            place.idle.clear()
            self._places.move_to_end(key)
            return place
        if key not in self._loading:
            self._raise_failure(key, since)
            if self._make_room(key):
                self._loading[key] = asyncio.create_task(self._run_load(key), name=f"load {key}")
        return None

    def _make_room(self, key: str) -> bool:
        """Whether a place is free for `key`; starts to evict an idle model where none is."""
        others = len(self._places) + len(self._loading) + len(self._unloading)
        if others < min(self._capacity, self._most_others.get(key, self._capacity - 1) + 1):
            return True
        if self._is_next(key) and (idle := [k for k in self._evictable() if not self._places[k].leases]):
            self._start_unload(idle[0])
        return False

    def _drain_for(self, key: str) -> None:
        """Let the least recently used busy model end what it computes and take nothing new."""
        if self._is_next(key) and key not in self._loading and (busy := self._evictable()):
            logger.info("draining %s to make room for %s", busy[0], key)
            self._start_unload(busy[0])

    def _is_next(self, key: str) -> bool:
        """Whether `key` has waited longest among those without a place, and no place is being cleared."""
        waiting = (k for k in self._queue if k not in self._places and k not in self._loading)
        return not self._unloading and next(waiting, None) == key

    def _evictable(self) -> list[str]:
        """Loaded keys that may go, least recently used first: not pinned, and nobody is just about to lease them."""
        return [key for key in self._places if key not in self._pinned and key not in self._queue]

    def _start_unload(self, key: str) -> asyncio.Task[None]:
        place = self._places.pop(key)
        task = asyncio.create_task(self._run_unload(key, place), name=f"unload {key}")
        self._unloading.add(task)
        task.add_done_callback(self._unload_done)
        return task

    def _unload_done(self, task: asyncio.Task[None]) -> None:
        self._unloading.discard(task)
        self._wake()

    async def _run_unload(self, key: str, place: _Place[T]) -> None:
        if place.leases:
            await place.idle.wait()
        self.evictions += 1
        unloading = self._unload(key, place.value)
        # The value must not live on here while `unload` frees its memory.
        del place
        try:
            await unloading
        except Exception:
            logger.exception("unloading %s failed", key)

    async def _run_load(self, key: str) -> None:
        self.loads += 1
        try:
            value = await self._load(key)
        except Exception as error:
            self.failures += 1
            if not (isinstance(error, OutOfMemory) and self._ask_for_more_room(key)):
                self._failed[key] = (time.monotonic(), _kept(error, key))
        else:
            self._failed.pop(key, None)
            self._places[key] = _Place(value)
        finally:
            del self._loading[key]
            self._wake()

    def _raise_failure(self, key: str, since: float) -> None:
        """Raise a load's error to those who waited for it, and to later ones for `retry_after` seconds."""
        if key in self._failed:
            failed_at, error = self._failed[key]
            # A load that was interrupted may be tried at once.
            retry_after = 0.0 if isinstance(error, Unavailable) else self._retry_after(key)
            if failed_at >= since or time.monotonic() - failed_at < retry_after:
                raise copy.copy(error)

    def _ask_for_more_room(self, key: str) -> bool:
        """Whether a key whose load ran out of memory may try again, with one neighbor less."""
        others = len([other for other in self._places if other not in self._pinned])
        if not others:
            return False
        self._most_others[key] = len(self._places) - 1
        logger.warning("%s does not fit beside %s; it will be loaded with one less", key, ", ".join(self._places))
        return True

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _kept(error: Exception, key: str) -> TroupeError:
    """A load's error as it is kept and given again: without its traceback, whose frames hold the half-loaded model."""
    if isinstance(error, TroupeError):
        return copy.copy(error)
    return ModelLoadFailed(f"{key}: {last_line(error)}")
