"""Why an adapter is not served, or not in batches with its base."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Self

from deployments.core.errors import ModelNotFound


class AdapterRefused(ModelNotFound):
    """An adapter cannot be served as it was trained. Its base is never served in its place.

    Attributes:
        reason: why, as a sentence that goes on from "it cannot be served:".
    """

    @property
    def reason(self) -> str:
        return self.message

    def named(self, adapter: str) -> Self:
        """The same for clients, with the adapter's name."""
        if self.message.startswith("The adapter "):
            return self
        return type(self)(f"The adapter {adapter!r} cannot be served: {self.message}", param="model")


class NeedsMerge(AdapterRefused):
    """An adapter cannot be served in batches with its base. The message is the reason, as a clause."""


def peft_is_installed() -> bool:
    """Whether adapters can be merged into copies of their bases."""
    return find_spec("peft") is not None


def needs_peft(reason: str) -> AdapterRefused:
    """The error if an adapter has to be merged and cannot be.

    Args:
        reason: why it has to be merged, as a clause.
    """
    return AdapterRefused(
        f"{reason}, so that it needs a merged copy of its base, which the peft package makes: pip install peft."
    )
