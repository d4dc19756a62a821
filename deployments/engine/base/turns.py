"""Whose turn it is: the order in which requests that wait begin.

A turn is up to 16 choices of one request, which begin one after the other. The next turn is found by three rules:

1. The lowest `priority` first.
2. Of equal ones, the clients in rotation: a turn of each, and a client's own turns in the order of arrival.
3. Age: if 32 later turns in a row have begun before the oldest one, that one is next, with the priority of those that
   it would have waited for. So nothing waits for ever, and what is less urgent takes at most every 33rd turn.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, abc, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from deployments.core.calls import Turn

T = TypeVar("T")

PATIENCE = 32
"""Turns that may pass the oldest one."""
_REMEMBERED = 1024


@dataclass(slots=True, eq=False)
class _Waiting(Generic[T]):
    """A turn that waits: its items, and its number in the order of arrival."""

    turn: Turn
    number: int
    items: list[T]


@dataclass(slots=True, eq=False)
class _Level(Generic[T]):
    """What waits with one priority: the clients in rotation, each with its turns."""

    clients: OrderedDict[str, deque[_Waiting[T]]] = field(default_factory=OrderedDict)

    def __iter__(self) -> Iterator[_Waiting[T]]:
        rotation = [iter(turns) for turns in self.clients.values()]
        while rotation:
            lap = [(turns, waiting) for turns in rotation if (waiting := next(turns, None)) is not None]
            rotation = [turns for turns, _ in lap]
            yield from (waiting for _, waiting in lap)


class TurnQueue(Generic[T]):
    """Items that wait for their turns. Iterating gives them in the order in which they would begin now."""

    def __init__(self) -> None:
        self._first: deque[T] = deque()
        self._levels: dict[int, _Level[T]] = {}
        self._waiting: dict[int, _Waiting[T]] = {}
        self._of: dict[int, _Waiting[T]] = {}
        self._groups: dict[str, _Waiting[T]] = {}
        self._begun: OrderedDict[str, None] = OrderedDict()
        self._numbers: list[int] = []
        self._arrived = 0
        self._passed = 0

    def __len__(self) -> int:
        return len(self._first) + len(self._of)

    def __iter__(self) -> Iterator[T]:
        yield from tuple(self._first)
        aged = self._aged
        if aged is not None:
            yield from tuple(aged.items)
        for priority in sorted(self._levels):
            for waiting in self._levels[priority]:
                if waiting is not aged:
                    yield from tuple(waiting.items)

    def add(self, item: T, turn: Turn) -> int:
        """Let an item wait; those of a turn that has begun come first. Returns its number in the order of arrival."""
        self._arrived += 1
        if turn.group in self._begun:
            self._first.append(item)
            return self._arrived
        waiting = self._groups.get(turn.group)
        if waiting is None:
            waiting = self._enter(turn, self._arrived)
        waiting.items.append(item)
        self._of[id(item)] = waiting
        return self._arrived

    def add_again(self, item: T, turn: Turn, number: int) -> None:
        """Let an item that had begun wait as the next one of its client.

        Args:
            number: its own in the order of arrival.
        """
        waiting = self._enter(Turn(priority=turn.priority, client=turn.client), number, first=True)
        waiting.items.append(item)
        self._of[id(item)] = waiting

    def add_first(self, items: abc.Sequence[T]) -> None:
        """Let items wait before all others, in their order, wherever they are now."""
        for item in items:
            self.discard(item)
        self._first.extendleft(reversed(items))

    def priority(self, item: T, own: int) -> int:
        """The priority with which an item begins: its own, or the most urgent one if its turn has come by age."""
        waiting = self._of.get(id(item))
        return min(own, *self._levels) if waiting is not None and waiting is self._aged else own

    def begin(self, item: T) -> None:
        """Remove an item because it begins: what is left of its turn comes first, then the next client's."""
        waiting = self._of.get(id(item))
        if waiting is None:
            self.discard(item)
            return
        oldest, turn = self._oldest, waiting.turn
        level = self._levels[turn.priority]
        self._leave(waiting)
        if turn.client in level.clients:
            level.clients.move_to_end(turn.client)
        self._first.extend(each for each in waiting.items if each is not item)
        if turn.group:
            self._begun[turn.group] = None
            if len(self._begun) > _REMEMBERED:
                self._begun.popitem(last=False)
        if oldest is not None and oldest is not waiting:
            self._passed += 1

    def discard(self, item: T) -> None:
        """Remove an item that does not begin, if it waits."""
        waiting = self._of.get(id(item))
        if waiting is None:
            if item in self._first:
                self._first.remove(item)
            return
        del self._of[id(item)]
        waiting.items.remove(item)
        if not waiting.items:
            self._leave(waiting)

    def clear(self) -> None:
        """Remove everything."""
        for item in list(self):
            self.discard(item)

    @property
    def _oldest(self) -> _Waiting[T] | None:
        numbers = self._numbers
        while numbers and numbers[0] not in self._waiting:
            heapq.heappop(numbers)
            self._passed = 0
        return self._waiting[numbers[0]] if numbers else None

    @property
    def _aged(self) -> _Waiting[T] | None:
        """The oldest turn, if enough others have passed it."""
        oldest = self._oldest
        return oldest if self._passed >= PATIENCE else None

    def _enter(self, turn: Turn, number: int, *, first: bool = False) -> _Waiting[T]:
        waiting: _Waiting[T] = _Waiting(turn, number, [])
        turns = self._levels.setdefault(turn.priority, _Level()).clients.setdefault(turn.client, deque())
        if first:
            turns.appendleft(waiting)
        else:
            turns.append(waiting)
        self._waiting[number] = waiting
        heapq.heappush(self._numbers, number)
        if turn.group:
            self._groups[turn.group] = waiting
        return waiting

    def _leave(self, waiting: _Waiting[T]) -> None:
        """Remove a turn; a client, or a priority, that has no other goes with it."""
        turn = waiting.turn
        level = self._levels[turn.priority]
        level.clients[turn.client].remove(waiting)
        if not level.clients[turn.client]:
            del level.clients[turn.client]
        if not level.clients:
            del self._levels[turn.priority]
        del self._waiting[waiting.number]
        self._groups.pop(turn.group, None)
        for item in waiting.items:
            del self._of[id(item)]
