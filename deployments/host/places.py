"""Where each model of a process is: in a place of its own by its version, or as an adapter over its base."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

from deployments.adapters.refused import AdapterRefused, NeedsMerge
from deployments.config.app import AppArgs
from deployments.config.model import ModelEntry
from deployments.core.calls import TURN
from deployments.core.errors import TroupeError
from deployments.host.adapters import Adapters
from deployments.host.leases import Leases, LeaseStats
from deployments.host.loaded_model import LoadedModel
from deployments.host.loading import Loading
from deployments.registry.catalogue import Catalogue
from deployments.registry.digest import json_digest
from deployments.registry.version import Rewritten, Version

logger = logging.getLogger("troupe.host")


class Places:
    """The models of one process that are loaded, being loaded, or placed over others.

    An adapter that batches cannot hold has a place of its own, as a merged copy of its base.

    Args:
        on_gone: called with the id of a model that was unloaded or could not be loaded.

    Attributes:
        leases: of the places.
    """

    def __init__(self, args: AppArgs, catalogue: Catalogue, loading: Loading, on_gone: Callable[[str], None]) -> None:
        self._catalogue = catalogue
        self._loading = loading
        self._on_gone = on_gone
        self._versions = ServedVersions()
        self._adapters = Adapters(catalogue)
        self._merged: dict[str, tuple[str, str]] = {}
        self.leases: Leases[LoadedModel] = Leases(
            self._load,
            self._unload,
            capacity=args.max_models_per_replica,
            patience=args.swap_patience_s,
            retry_after=lambda key: self._entry(key).load_retry_s,
            idle_limit=lambda key: self._entry(key).idle_unload_s,
        )

    def snapshot(self) -> dict[str, Any]:
        """What is held at this moment, as JSON values."""
        stats = self.leases.stats()
        models = [
            {"id": model.entry.id, "fingerprint": model.fingerprint, "weight_bytes": model.weight_bytes}
            | {"merged": self._merged.get(model.entry.id, ("", None))[1]}
            | {"in_use": stats.in_use.get(key, 0), "adapters": self._adapters.over(model)}
            | asdict(model.engine.stats())
            for key, model in self.leases.values().items()
        ]
        return {
            "models": models,
            "loading": self._versions.models(stats.loading),
            "failed": self._versions.failures(stats),
            "refused": self._adapters.refused,
            **stats.counters,
            **self._loading.copies.stats(),
        }

    @asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[LoadedModel]:
        """The newest version of a model, or of an adapter within a lease of its base."""
        version = await self._catalogue.version(model)
        async with AsyncExitStack() as stack:
            if self._catalogue.place_of(model) == model:
                yield await self._place(stack, version)
                return
            adapted = await self._over_base(stack, version)
            yield adapted or await self._merged_copy(stack, version)

    async def _place(self, stack: AsyncExitStack, version: Version) -> LoadedModel:
        self._follow(version, self.leases)
        if self._entry(version.key).pinned:
            self.leases.pin(version.key)
        with self._loading.copies.wanted(version.key):
            return await stack.enter_async_context(self.leases.lease(version.key, TURN.get().priority))

    async def _over_base(self, stack: AsyncExitStack, version: Version) -> LoadedModel | None:
        """An adapter beside its base; None if it has to be merged."""
        model = version.model
        if self._merged.get(model, ("",))[0] == version.key:
            return None
        self._merged.pop(model, None)
        self._follow(version, self._adapters)
        async with AsyncExitStack() as within:
            base = await within.enter_async_context(self.lease(self._catalogue.place_of(model)))
            entry = self._catalogue.entry_of(model)
            try:
                adapted = await within.enter_async_context(self._adapters.lease(base, entry, version))
            except NeedsMerge as reason:
                logger.info("adapter %s gets a merged copy of its base: %s", model, reason)
                self._merged[model] = (version.key, reason.message)
                return None
            stack.push_async_exit(within.pop_all().__aexit__)
            return adapted

    async def _merged_copy(self, stack: AsyncExitStack, version: Version) -> LoadedModel:
        """An adapter in a place of its own; its version is also that of its base."""
        base = await self._catalogue.version(self._catalogue.place_of(version.model))
        both = replace(version, digest=json_digest([version.digest, base.digest, base.entry]))
        try:
            return await self._place(stack, both)
        except AdapterRefused as refused:
            self._adapters.refuse(version, refused)
            raise

    async def evict(self, model: str) -> bool:
        """Unload a model, also from host memory; False if it is not loaded."""
        self._catalogue.expire(model)
        newest = self._versions.newest(model)
        if newest is None:
            return False
        with self._loading.copies.freed(newest.key):
            return await self._adapters.evict(newest.key) or await self.leases.evict(newest.key)

    def say_if_gone(self, model: str) -> None:
        """Report a model that has no place."""
        stats = self.leases.stats()
        if model not in self._versions.models((*stats.loaded, *stats.loading)):
            self._on_gone(model)

    def _follow(self, version: Version, held: Leases[LoadedModel] | Adapters) -> None:
        """Let the older version of a model end what it computes; new requests wait for this one."""
        older = self._versions.follow(version, place=held is self.leases)
        if older is not None:
            self.leases.retire(older.key)
            self._adapters.retire(older.key)
            asyncio.get_running_loop().run_in_executor(None, self._loading.copies.drop, older.key)

    def _entry(self, key: str) -> ModelEntry:
        """What is loaded in a place."""
        entry = self._catalogue.entry_of(self._versions[key].model)
        return entry if entry.base is None else entry.merged(self._catalogue.entry_of(entry.base))

    async def _load(self, key: str) -> LoadedModel:
        version = self._versions[key]
        self._catalogue.check_present(version.model)
        try:
            model = await self._loading.load(self._entry(key), version)
        except BaseException as error:
            self._on_gone(version.model)
            if isinstance(error, TroupeError) and not await self._catalogue.is_current(version):
                raise Rewritten(f"The files of {key} changed while they were loaded: {error}") from error
            raise
        if not await self._catalogue.is_current(version):
            logger.warning("the files of %s changed while they were loaded; what was read of them is dropped", key)
            await self._loading.unload(key, model)
            raise Rewritten(f"The files of {key} changed while they were loaded.")
        self._catalogue.learn(version.model, model.engine.max_model_len, model.fingerprint, model.answers)
        return model

    def _unload(self, key: str, model: LoadedModel) -> Awaitable[None]:
        logger.info("unloading %s", key)
        if newest := self._versions.is_newest(key, model.entry.id):
            self._on_gone(model.entry.id)
        else:
            self._versions.forget(key)
        self._adapters.drop(model)
        # Not awaited here, where `model` would keep it alive.
        return self._loading.unload(key, model, keep=newest)


class ServedVersions:
    """The newest version of each model of a process, and those that still have a place."""

    def __init__(self) -> None:
        self._placed: dict[str, Version] = {}
        self._newest: dict[str, Version] = {}

    def __getitem__(self, key: str) -> Version:
        """The version of a key that has a place, or waits for one."""
        return self._placed[key]

    def newest(self, model: str) -> Version | None:
        """The newest version of a model that was asked for."""
        return self._newest.get(model)

    def is_newest(self, key: str, model: str) -> bool:
        """Whether a key is that of the newest version."""
        newest = self._newest.get(model)
        return newest is not None and newest.key == key

    def follow(self, version: Version, *, place: bool) -> Version | None:
        """Let a version be the newest of its model.

        Args:
            place: it has a place of its own.

        Returns:
            The version before it, if that was another one.
        """
        older = self._newest.get(version.model)
        self._newest[version.model] = version
        if place:
            self._placed[version.key] = version
        return None if older is None or older.key == version.key else older

    def forget(self, key: str) -> None:
        """Drop a key that has no place any more."""
        self._placed.pop(key, None)

    def models(self, keys: tuple[str, ...]) -> list[str]:
        """The ids of the models that keys stand for."""
        return [self._placed[key].model for key in keys]

    def failures(self, stats: LeaseStats) -> dict[str, str]:
        """Why the last load of the newest versions failed, by model."""
        return {
            version.model: stats.failed[version.key].message
            for version in self._newest.values()
            if version.key in stats.failed and version.key not in stats.loading
        }
