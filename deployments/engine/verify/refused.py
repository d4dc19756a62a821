"""Why continuous batching does not serve a model."""

from __future__ import annotations


class Refused(Exception):
    """Continuous batching does not serve a model. The message is the reason, as a clause. `build_engine` catches it."""
