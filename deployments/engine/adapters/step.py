"""Which adapter each sequence of a forward has."""

from __future__ import annotations

import threading
from collections.abc import Sequence

Keys = tuple[str, ...]
"""The adapter of each sequence of a forward, by its version; empty for the base."""


class AdapterStep:
    """One forward with adapters, of this thread.

    Attributes:
        keys: of its sequences, in their order.
        shared: the adapter of all of them; None if they differ.
        used: a module that an adapter changes was computed.
    """

    __slots__ = ("keys", "shared", "used")

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys: Keys = tuple(keys)
        self.shared = self.keys[0] if len(set(self.keys)) == 1 else None
        self.used = False


_local = threading.local()


def current_step() -> AdapterStep | None:
    """The forward that this thread computes with adapters; None if it computes none, or the base alone."""
    step: AdapterStep | None = getattr(_local, "step", None)
    return step


def set_step(step: AdapterStep | None) -> None:
    """Begin a forward with adapters in this thread, or end it."""
    _local.step = step
