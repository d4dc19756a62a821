"""Which models are loaded: in-use counts, least recently used eviction, one load at a time per model.

A request holds a lease while it computes. A leased model is never unloaded. A model that is not loaded takes a free
place, else the place of the least recently used idle model; where all are busy the request waits, and after
`patience` seconds the least recently used one takes no new leases until its place has changed hands, so that steady
traffic for one model cannot starve another. Loads are shared by all who wait and outlive a waiter that gives up. A
model whose load runs out of memory beside others is loaded again with fewer of them.

Of requests that wait for places the most urgent one is next. It waits for no patience where only less urgent requests
use a model. A model that more urgent requests use, or have used in the last `patience` seconds, keeps its place; but
after 32 times the patience a request is as urgent as any, so that nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from deployments.core.errors import ModelLoadFailed, OutOfMemory, TroupeError, Unavailable, last_line

logger = logging.getLogger("troupe.leases")

T = TypeVar("T")


_AGE = 32
"""Patiences after which a request that waits is as urgent as any."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request that waits for a lease."""

    priority: int
    since: float

    def urgency(self, age: float) -> float:
        """Its priority, until it has waited for `age` seconds."""
        return -math.inf if time.monotonic() - self.since >= age else self.priority


@dataclass(slots=True)
class _Place(Generic[T]):
    """A loaded value and the requests that use it.

    Attributes:
        users: how many of each priority.
        used: when one of a priority has last ended, without those that a more urgent one has followed.
    """

    value: T
    users: Counter[int] = field(default_factory=Counter)
    used: dict[int, float] = field(default_factory=dict)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    idle_since: float = field(default_factory=time.monotonic)

    @property
    def leases(self) -> int:
        return self.users.total()

    def begin(self, priority: int) -> None:
        self.users[priority] += 1
        self.idle.clear()

    def end(self, priority: int) -> None:
        self.users[priority] -= 1
        self.users = +self.users
        self.used = {other: ended for other, ended in self.used.items() if other < priority}
        self.used[priority] = time.monotonic()

    def kept_until(self, urgency: float, patience: float) -> float:
        """Until when the place is that of requests that are more urgent."""
        if any(priority < urgency for priority in self.users):
            return math.inf
        return max((ended + patience for priority, ended in self.used.items() if priority < urgency), default=0.0)


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
        self._queue: OrderedDict[str, list[_Waiter]] = OrderedDict()
        self._changed = asyncio.Event()
        self._pinned: set[str] = set()
        self._closed = False
        self.loads = self.failures = self.evictions = 0

    @contextlib.asynccontextmanager
    async def lease(self, key: str, priority: int = 0) -> AsyncIterator[T]:
        """The value of a key, loaded if need be, kept until the block ends.

        Args:
            priority: of the request; a lower one is more urgent.

        Raises:
            TroupeError: the load failed, now or less than `retry_after` seconds ago, or the leases are closed.
        """
        place = await self._acquire(key, priority)
        try:
            yield place.value
        finally:
            place.end(priority)
            if not place.users:
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
            waiting=sum(map(len, self._queue.values())),
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

    async def _acquire(self, key: str, priority: int) -> _Place[T]:
        waiter = _Waiter(priority, time.monotonic())
        self._queue.setdefault(key, []).append(waiter)
        try:
            while (place := self._try(key, waiter)) is None:
                self._drain_for(key, waiter)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self._look_again(waiter))
            return place
        finally:
            self._queue[key].remove(waiter)
            if not self._queue[key]:
                del self._queue[key]
            if any(self._urgency(other) < priority for other in self._queue):
                self._wake()  # They may have this place.

    def _try(self, key: str, waiter: _Waiter) -> _Place[T] | None:
        """A lease now, or None; starts the load, or the eviction it needs, where possible."""
        if self._closed:
            raise Unavailable("The server is shutting down.", retry_after=5)
        place = self._places.get(key)
        if place is not None:
            place.begin(waiter.priority)
            self._places.move_to_end(key)
            return place
        if key not in self._loading:
            self._raise_failure(key, waiter.since)
            if self._make_room(key, waiter):
                self._loading[key] = asyncio.create_task(self._run_load(key), name=f"load {key}")
                self._wake()  # Others may have a place that it has not taken.
        return None

    def _make_room(self, key: str, waiter: _Waiter) -> bool:
        """Whether a place is free for `key`; starts to evict an idle model where none is."""
        others = len(self._places) + len(self._loading) + len(self._unloading)
        if others < min(self._capacity, self._most_others.get(key, self._capacity - 1) + 1):
            return self._urgency(key) <= min(map(self._urgency, self._placeless))
        if self._is_next(key) and (idle := [k for k in self._open_to(waiter) if not self._places[k].users]):
            self._start_unload(idle[0])
        return False

    def _drain_for(self, key: str, waiter: _Waiter) -> None:
        """Let the least recently used busy model end what it computes and take nothing new, if its time has come."""
        if not self._is_next(key) or key in self._loading:
            return
        is_patient = time.monotonic() - waiter.since < self._patience
        for busy in self._open_to(waiter):
            if not is_patient or waiter.urgency(self._age) < min(self._places[busy].users, default=math.inf):
                logger.info("draining %s to make room for %s", busy, key)
                self._start_unload(busy)
                return

    def _look_again(self, waiter: _Waiter) -> float | None:
        """Seconds until more is open to a request that waits, though nothing else changes; None if never."""
        now, urgency = time.monotonic(), waiter.urgency(self._age)
        times = [waiter.since + self._patience, waiter.since + self._age]
        times += [place.kept_until(urgency, self._patience) for place in self._places.values()]
        return min((time - now for time in times if now < time < math.inf), default=None)

    @property
    def _age(self) -> float:
        return _AGE * self._patience

    def _urgency(self, key: str) -> float:
        """That of the most urgent request that waits for a key."""
        return min(waiter.urgency(self._age) for waiter in self._queue[key])

    @property
    def _placeless(self) -> list[str]:
        """The keys that wait for a place, in the order of arrival."""
        return [k for k in self._queue if k not in self._places and k not in self._loading]

    def _is_next(self, key: str) -> bool:
        """Whether no place is being cleared, and `key` is the first of the most urgent ones that wait for a place."""
        return not self._unloading and min(self._placeless, key=self._urgency, default=None) == key

    def _open_to(self, waiter: _Waiter) -> list[str]:
        """Loaded keys that may go for a request, least recently used first.

        They are not pinned, nobody is just about to lease them, and they are not kept for more urgent requests.
        """
        now, urgency = time.monotonic(), waiter.urgency(self._age)
        free = {key: place for key, place in self._places.items() if key not in self._pinned and key not in self._queue}
        return [key for key, place in free.items() if place.kept_until(urgency, self._patience) <= now]

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
