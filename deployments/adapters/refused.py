"""Why an adapter is not served."""

from __future__ import annotations

from deployments.core.errors import ModelNotFound


class AdapterRefused(ModelNotFound):
    """An adapter cannot be served as it was trained. Its base is never served in its place.

    Attributes:
        reason: why, as a sentence that goes on from "it cannot be served:".
    """

    @property
    def reason(self) -> str:
        return self.message

    def named(self, adapter: str) -> AdapterRefused:
        """The same for clients, with the adapter's name."""
        if self.message.startswith("The adapter "):
            return self
        return AdapterRefused(f"The adapter {adapter!r} cannot be served: {self.message}", param="model")
