"""The process's random state, lent to one computation at a time.

A loader's functions draw from what the whole process shares: torch's global generators, `random` and numpy's legacy
functions. So that a seed means the same text whoever else computes, each of them gets a turn, in which that state is
its own. A turn is passed on between two tokens where the function has a streamer or stopping criteria.

The price: generate hooks of several models in one process compute by turns, and wait while a loader runs. A function
that keeps its turn for longer than its limit, because it hangs or has no tokens to pass it on at, loses it to whoever
waits; what it draws from then on counts for nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

TURN_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Numbers:
    """A copy of the state."""

    cpu: torch.Tensor
    cuda: list[torch.Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> _Numbers:
        cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else []
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def __eq__(self, other: object) -> bool:
        """Whether nothing has been drawn in between."""
        if not isinstance(other, _Numbers):
            return NotImplemented
        tensors = zip([self.cpu, *self.cuda], [other.cpu, *other.cuda], strict=False)
        mine, its = self.numpy, other.numpy
        same = self.python == other.python and all(np.array_equal(a, b) for a, b in zip(mine, its, strict=True))
        return same and all(torch.equal(a, b) for a, b in tensors)


class Turn:
    """One computation's share of the random state.

    Args:
        limit: seconds it may keep the state while others wait.
        shared: others of this kind may have it at the same time, and what they do to the state stays.

    Attributes:
        lost: it has kept the state for longer.
    """

    def __init__(self, state: RandomState, limit: float, *, shared: bool = False) -> None:
        self.limit = limit
        self.shared = shared
        self.lost = False
        self.since = 0.0
        self._state = state

    def give_way(self) -> None:
        """Let those who wait have a turn first."""
        self._state.pass_on(self)


class RandomState:
    """Who has the process's random state, and who waits for it. There is one: `RANDOM_STATE`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[Turn] = deque()
        self._holders: list[Turn] = []
        self._outside: _Numbers | None = None
        self._current = threading.local()

    @contextlib.contextmanager
    def seeded(self, seed: int | None, limit: float = TURN_LIMIT_S) -> Iterator[Turn]:
        """A turn that begins with a seed, or with fresh numbers; what was before it is there again after it."""
        within: Turn | None = getattr(self._current, "turn", None)
        if within is not None and within in self._holders:
            before = _Numbers.now()
            _seed(seed)
            try:
                yield within
            finally:
                before.restore()
            return
        with self._turn(Turn(self, limit)) as turn:
            _seed(seed)
            yield turn

    def shared(self, limit: float = TURN_LIMIT_S) -> contextlib.AbstractContextManager[Turn]:
        """A turn that goes on with the state as it is outside all turns, together with others that do."""
        return self._turn(Turn(self, limit, shared=True))

    def draws(self, call: Callable[[], Any], limit: float) -> bool:
        """Whether a function draws from the state, tried once."""
        with self.seeded(0, limit):
            before = _Numbers.now()
            call()
            return before != _Numbers.now()

    def pass_on(self, turn: Turn) -> None:
        """Let those who wait go before the holder; returns when it is its turn again."""
        if not self._line or turn.lost:
            return
        mine = _Numbers.now()
        with self._changed:
            if turn.lost:
                return
            self._holders.remove(turn)
            self._changed.notify_all()
            self._wait(turn)
        mine.restore()

    @contextlib.contextmanager
    def _turn(self, turn: Turn) -> Iterator[Turn]:
        with self._changed:
            self._wait(turn)
            if self._outside is None:
                self._outside = _Numbers.now()
            elif turn.shared and len(self._holders) == 1:
                self._outside.restore()
        self._current.turn = turn
        try:
            yield turn
        finally:
            self._current.turn = None
            self._leave(turn)

    def _wait(self, turn: Turn) -> None:
        """Until the state is free or overdue, in the order of arrival; the lock is held."""
        arrived = time.monotonic()
        self._line.append(turn)
        while self._line[0] is not turn or not self._free_for(turn):
            left = None
            if self._line[0] is turn:
                left = max(max(holder.since, arrived) + holder.limit for holder in self._holders) - time.monotonic()
                if left <= 0:
                    self._take_over()
                    break
            self._changed.wait(left)
        self._line.popleft()
        self._holders.append(turn)
        turn.since = time.monotonic()
        self._changed.notify_all()

    def _free_for(self, turn: Turn) -> bool:
        return not self._holders or (turn.shared and all(holder.shared for holder in self._holders))

    def _take_over(self) -> None:
        for holder in self._holders:
            holder.lost = True
            logger.warning(
                "A hook or loader has used the random number generators for %g s; others continue.", holder.limit
            )
        self._holders.clear()

    def _leave(self, turn: Turn) -> None:
        with self._changed:
            if turn.lost:
                return
            self._holders.remove(turn)
            if not self._holders and turn.shared:
                self._outside = _Numbers.now()
            if not self._holders and not self._line and self._outside is not None:
                self._outside.restore()
                self._outside = None
            self._changed.notify_all()


def _seed(seed: int | None) -> None:
    value = int.from_bytes(os.urandom(8), "big") >> 1 if seed is None else seed
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


RANDOM_STATE = RandomState()


def in_turn(hook: Callable[..., Any], limit: float) -> Callable[..., Any]:
    """A hook that draws, with a turn for every call."""

    @functools.wraps(hook)
    def called(*args: Any, **kwargs: Any) -> Any:
        with RANDOM_STATE.seeded(None, limit):
            return hook(*args, **kwargs)

    return called


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
