"""Why continuous batching does not serve a model."""

from __future__ import annotations


class Refused(Exception):
    """Continuous batching does not serve a model. The message is the reason, as a clause. `build_engine` catches it."""


class Different(Refused):
    """Its answers are not those of `generate`."""


class Unfaithful(RuntimeError):
    """A model computes something else in a batch than it does for a prompt by itself."""
