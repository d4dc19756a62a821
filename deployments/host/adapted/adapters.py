"""The adapters over all loaded models of a process."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from deployments.adapters.refused import AdapterRefused, NeedsMerge
from deployments.config.model import ModelEntry
from deployments.host.adapted.slots import AdapterSlots
from deployments.host.loaded_model import LoadedModel
from deployments.registry.catalogue import Catalogue
from deployments.registry.version import Version

logger = logging.getLogger("troupe.host")


class Adapters:
    """Leases adapters over loaded models, and remembers which were refused.

    Args:
        catalogue: of this process.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._slots: dict[LoadedModel, AdapterSlots] = {}
        self._refused: dict[str, tuple[str, AdapterRefused]] = {}

    @asynccontextmanager
    async def lease(self, base: LoadedModel, entry: ModelEntry, version: Version) -> AsyncIterator[LoadedModel]:
        """The base with an adapter, kept until the block ends; see `AdapterSlots.lease` for the errors."""
        slots = self._slots.get(base)
        if slots is None:
            slots = self._slots[base] = AdapterSlots(base, self._catalogue)
        self._catalogue.check_present(entry.id)
        try:
            async with slots.lease(entry, version) as adapted:
                self._refused.pop(entry.id, None)
                yield adapted
        except NeedsMerge:
            raise
        except AdapterRefused as refused:
            self.refuse(version, refused)
            raise

    def refuse(self, version: Version, refused: AdapterRefused) -> None:
        """Remember that an adapter is refused, and say so once for each version."""
        if self._refused.get(version.model, ("",))[0] != version.key:
            logger.warning("%s", refused)
            self._refused[version.model] = (version.key, refused)

    def retire(self, key: str) -> None:
        """Drop a version that nobody asks for any more, once nobody leases it."""
        for slots in self._slots.values():
            slots.retire(key)

    async def evict(self, key: str) -> bool:
        """Drop a version once nobody leases it; False if it is placed nowhere."""
        return any([await slots.evict(key) for slots in list(self._slots.values())])

    def drop(self, base: LoadedModel) -> None:
        """Forget the adapters over a model that is unloaded."""
        self._slots.pop(base, None)

    def over(self, base: LoadedModel) -> list[dict[str, Any]]:
        """The adapters that are placed over a model, as JSON values."""
        slots = self._slots.get(base)
        return [] if slots is None else slots.snapshot()

    @property
    def refused(self) -> dict[str, str]:
        """Why adapters were refused, by their ids."""
        return {model: refused.message for model, (_, refused) in self._refused.items()}
