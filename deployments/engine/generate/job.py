"""A request inside the generate engine."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.engine.text.text_request import TextRequest


@dataclass(slots=True, kw_only=True, eq=False)
class Job(TextRequest):
    """A request that runs through `generate`.

    Attributes:
        begun: it has been run at least once.
        scored: the prompt's log-probabilities have been given out.
    """

    begun: bool = False
    scored: bool = False
