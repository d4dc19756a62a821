"""Skips for what an older transformers, within the range that Troupe takes, lacks or gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest

from deployments.engine.model.rotary import UnknownRotary
from deployments.engine.verify.refused import Unfaithful

INSTALLED = version("transformers")
_COMPLETE = (5, 23)
"""The first version that has all that is tested."""

# What such a version raises: its own faults in building or running a model, and refusals of the batching engine.
_FAULTS = (Unfaithful, UnknownRotary, UnboundLocalError, DeprecationWarning)


def is_older() -> bool:
    """Whether something may be lacking."""
    return tuple(int(number) for number in INSTALLED.split(".")[:2]) < _COMPLETE


@contextmanager
def unless_it_lacks(name: str) -> Iterator[None]:
    """Skip a test that fails for a fault of an older transformers, and say for which.

    Args:
        name: what the test is about, for the message.
    """
    try:
        yield
    except _FAULTS as error:
        if not is_older():
            raise
        pytest.skip(f"transformers {INSTALLED} cannot run {name}: {type(error).__name__}: {error}")
