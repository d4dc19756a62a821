"""The process's random state, lent to one computation at a time.

A loader's functions draw from what the whole process shares: torch's global generators, `random` and numpy's legacy
functions. So that a seed means the same text whoever else computes, each of them gets a turn, in which that state is
its own. A turn is passed on between two tokens where the function has a streamer or stopping criteria.

The price: generate hooks of several models in one process compute by turns, and wait while a loader runs. Loaders run
one after the other, too: while they make a model, many of them change more of the process and then put back what they
have found, such as torch's default dtype or what Accelerate's `init_empty_weights` replaces. A function that keeps its
turn for longer than its limit, because it hangs or has no tokens to pass it on at, loses it to whoever waits; what it
draws from then on counts for nothing.
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
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
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
        lasting: it goes on with the state as it is outside all turns, and what it does to the state stays.

    Attributes:
        lost: it has kept the state for longer.
    """

    def __init__(self, state: RandomState, limit: float, *, lasting: bool = False) -> None:
        self.limit = limit
        self.lasting = lasting
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
        self._holder: Turn | None = None
        self._outside: _Numbers | None = None
        self._current = threading.local()

    @contextlib.contextmanager
    def seeded(self, seed: int | None, limit: float = TURN_LIMIT_S) -> Iterator[Turn]:
        """A turn that begins with a seed, or with fresh numbers; what was before it is there again after it."""
        within: Turn | None = getattr(self._current, "turn", None)
        if within is not None and within is self._holder:
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

    def lasting(self, limit: float = TURN_LIMIT_S) -> contextlib.AbstractContextManager[Turn]:
        """A turn that goes on with the state as it is outside all turns, and leaves it changed: a loader's."""
        return self._turn(Turn(self, limit, lasting=True))

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
            self._holder = None
            self._changed.notify_all()
            self._wait(turn)
        mine.restore()

    @contextlib.contextmanager
    def _turn(self, turn: Turn) -> Iterator[Turn]:
        with self._changed:
            self._wait(turn)
            if self._outside is None:
                self._outside = _Numbers.now()
            elif turn.lasting:
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
        while self._line[0] is not turn or self._holder is not None:
            left = None
            if self._line[0] is turn and self._holder is not None:
                left = max(self._holder.since, arrived) + self._holder.limit - time.monotonic()
                if left <= 0:
                    self._take_over(self._holder)
                    break
            self._changed.wait(left)
        self._line.popleft()
        self._holder = turn
        turn.since = time.monotonic()
        self._changed.notify_all()

    def _take_over(self, holder: Turn) -> None:
        holder.lost = True
        logger.warning(
            "A hook or loader has used the random number generators for %g s; others continue.", holder.limit
        )

    def _leave(self, turn: Turn) -> None:
        with self._changed:
            if turn.lost:
                return
            self._holder = None
            if turn.lasting:
                self._outside = _Numbers.now()
            if not self._line and self._outside is not None:
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
