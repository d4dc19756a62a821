"""A model as its files were at one moment."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.core.errors import Unavailable
from deployments.registry.stamp import NOTHING, Stamp

_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """The files of a model at one moment, by their content.

    Attributes:
        model: the model's id.
        digest: of the files and of what else makes the weights; empty for a model whose loader names no files of this
            machine, which has one version.
        stamp: of the files.
        entry: digest of the model's entry, if that can change while the server runs.
    """

    model: str
    digest: str = ""
    stamp: Stamp = NOTHING
    entry: str = ""

    @property
    def key(self) -> str:
        """What everything is keyed by that was computed with this version: the model's id, `@`, and 12 hex digits."""
        parts = [part[:_DIGITS] for part in (self.digest, self.entry) if part]
        return f"{self.model}@{'.'.join(parts)}" if parts else self.model


class Rewritten(Unavailable):
    """The files of a model changed while they were loaded."""
