"""The adapters over the loaded models: placed on demand, leased to requests, least recently used first to go."""

from __future__ import annotations

import asyncio
import copy
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deployments.adapters.lora_file import LoraFile, read_lora
from deployments.adapters.refused import AdapterRefused, NeedsMerge, needs_peft, peft_is_installed
from deployments.config.model import AdapterOptions, ModelEntry
from deployments.core.errors import TroupeError, Unavailable, last_line
from deployments.engine.adapters.table import PlacedAdapter
from deployments.engine.base.failures import free_memory, is_out_of_memory
from deployments.engine.base.protocol import AdapterEngine, Engine
from deployments.engine.no_text import NoTextEngine
from deployments.host.adapted.engine import AdaptedEngine
from deployments.host.adapted.text_side import adapted_info, further_terminators
from deployments.host.fingerprint import adapter_fingerprint
from deployments.host.leases import Leases
from deployments.host.loaded_model import LoadedModel
from deployments.registry.catalogue import Catalogue
from deployments.registry.version import Rewritten, Version
from model_loaders.contract import ModelInfo
from model_loaders.local_folder import found
from model_loaders.prompts.hooks import Hooks

logger = logging.getLogger("troupe.host")

_GIB = 1 << 30
_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Slot:
    """An adapter that is placed, and its base as requests for the adapter see it."""

    model: LoadedModel
    placed: PlacedAdapter


class AdapterSlots:
    """The adapters over one model. All methods belong to one event loop.

    Args:
        base: the model; the leases of its adapters are held within leases of it.
        catalogue: tells whether files are unchanged, and learns what was placed.
    """

    def __init__(self, base: LoadedModel, catalogue: Catalogue) -> None:
        self._base = base
        self._catalogue = catalogue
        self._asked: dict[str, tuple[ModelEntry, Version]] = {}
        self._leases: Leases[Slot] = Leases(
            self._load, self._unload, capacity=sys.maxsize, retry_after=lambda key: base.entry.load_retry_s
        )

    @asynccontextmanager
    async def lease(self, entry: ModelEntry, version: Version) -> AsyncIterator[LoadedModel]:
        """The base with an adapter, kept until the block ends.

        Raises:
            NeedsMerge: it can be served as a merged copy of the base.
            AdapterRefused: it cannot be served.
            TroupeError: it cannot be placed now.
        """
        self._asked.pop(version.key, None)
        self._asked[version.key] = (entry, version)
        if len(self._asked) > _REMEMBERED:  # Those that are being placed are the last.
            del self._asked[next(iter(self._asked))]
        async with self._leases.lease(version.key) as slot:
            yield slot.model

    def retire(self, key: str) -> None:
        """Drop a version that nobody asks for any more, once nobody leases it."""
        self._leases.retire(key)

    async def evict(self, key: str) -> bool:
        """Drop a version once nobody leases it; False if it is not placed."""
        return await self._leases.evict(key)

    def snapshot(self) -> list[dict[str, Any]]:
        """The adapters that are placed, as JSON values."""
        in_use = self._leases.stats().in_use
        return [
            {
                "id": slot.model.entry.id,
                "fingerprint": slot.model.fingerprint,
                "in_use": in_use.get(key, 0),
                "bytes": slot.placed.nbytes,
                "rank": slot.placed.rank,
                "modules": len(slot.placed.modules),
                "apart": slot.placed.apart or None,
            }
            for key, slot in self._leases.values().items()
        ]

    async def _load(self, key: str) -> Slot:
        entry, version = self._asked[key]
        self._catalogue.check_present(entry.id)
        try:
            slot = await asyncio.to_thread(self._place, key)
        except Exception as error:
            if not await self._catalogue.is_current(version):
                raise Rewritten(f"The files of {key} changed while they were read: {error}") from None
            raise _as_refusal(error, entry.id) from None
        if not await self._catalogue.is_current(version):
            await self._unload(key, slot)
            raise Rewritten(f"The files of {key} changed while they were read.")
        await self._make_room(slot.placed.nbytes)
        base = self._base
        self._catalogue.learn(entry.id, base.engine.max_model_len, slot.model.fingerprint, base.answers)
        logger.info("adapter %s is ready: %d bytes over %s", entry.id, slot.placed.nbytes, base.entry.id)
        return slot

    def _place(self, key: str) -> Slot:
        """Read an adapter and place it beside the base. Blocks."""
        entry, version = self._asked[key]
        engine, options = self._base.engine, entry.adapters
        file, info = _read(self._base, entry)
        assert isinstance(engine, AdapterEngine)
        placed = engine.add_adapter(key, file, getattr(torch, options.dtype))
        try:
            _check_size(placed.nbytes, options)
        except AdapterRefused:
            engine.remove_adapter(key)
            raise
        return Slot(self._view(key, entry, version, None if info is None else Hooks(info)), placed)

    def _view(self, key: str, entry: ModelEntry, version: Version, hooks: Hooks | None) -> LoadedModel:
        """The base as requests for an adapter see it: another name, fingerprint and engine, and its own text side."""
        base = self._base
        assert isinstance(base.engine, AdapterEngine)
        table = base.engine.adapters
        view = copy.copy(base)
        view.entry = entry
        view.named = adapter_fingerprint(base.named, entry, version)
        view.computing = lambda: table.applied([key])
        if hooks is not None:
            view.use_text_side(hooks)
        if not isinstance(base.engine, NoTextEngine):
            more = frozenset[int]() if hooks is None else further_terminators(hooks, base.hooks)
            view.engine = AdaptedEngine(base.engine, key, more)
        return view

    async def _make_room(self, needed: int) -> None:
        """Drop idle adapters, the least recently used first, until those that stay fit beside a new one."""
        held = needed + sum(slot.placed.nbytes for slot in self._leases.values().values())
        stats = self._leases.stats()
        for key, slot in self._leases.values().items():
            if held <= self._base.entry.adapters.memory_gib * _GIB:
                return
            if not stats.in_use[key]:
                held -= slot.placed.nbytes
                await self._leases.evict(key)

    async def _unload(self, key: str, slot: Slot) -> None:
        logger.info("dropping adapter %s", key)
        engine = self._base.engine
        assert isinstance(engine, AdapterEngine)
        del slot
        await asyncio.to_thread(engine.remove_adapter, key)


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


async def try_adapter(base: LoadedModel, entry: ModelEntry) -> None:
    """Compare an adapter with its base without placing it. One that needs a merged copy of the base is taken as it is.

    Raises:
        AdapterRefused: it cannot be served; the message is the reason.
        TroupeError: it cannot be tried now.
    """

    def fit() -> None:
        file, _ = _read(base, entry)
        engine = base.engine
        assert isinstance(engine, AdapterEngine)
        _check_size(engine.adapters.fit(file, getattr(torch, entry.adapters.dtype)).nbytes, entry.adapters)

    try:
        await asyncio.to_thread(fit)
    except AdapterRefused as reason:
        if not isinstance(reason, NeedsMerge):
            raise
        if not peft_is_installed():
            raise needs_peft(reason.message) from None
    except Exception as error:
        raise _as_refusal(error, entry.id) from None


def _read(base: LoadedModel, entry: ModelEntry) -> tuple[LoraFile, ModelInfo | None]:
    """The matrices of an adapter, and its text side if that is not its base's."""
    check_engine(base.engine)
    folder = found(entry.adapter or "")
    return read_lora(folder, entry.adapters.max_rank), adapted_info(base.info, folder)


def _check_size(nbytes: int, options: AdapterOptions) -> None:
    if nbytes > options.memory_gib * _GIB:
        raise AdapterRefused(
            f"it has {nbytes / _GIB:.3g} GiB; adapters.memory_gib of its base is {options.memory_gib:g}."
        )


def _as_refusal(error: Exception, adapter: str) -> Exception:
    """What a failure to place an adapter means for its requests. It never fails the base."""
    if isinstance(error, NeedsMerge):
        return error if peft_is_installed() else needs_peft(error.message).named(adapter)
    if isinstance(error, AdapterRefused):
        return error.named(adapter)
    if isinstance(error, TroupeError):
        return error
    if is_out_of_memory(error):
        # Not the error that makes the host ask for more room: the base has its place.
        free_memory()
        return Unavailable(f"The device has no memory for the adapter {adapter!r}.", retry_after=5)
    logger.exception("adapter %s cannot be placed", adapter, exc_info=error)
    return AdapterRefused(f"{last_line(error)}.").named(adapter)


def check_engine(engine: Engine) -> None:
    """Refuse adapters over a model whose engine has none.

    Raises:
        AdapterRefused: it names the engine.
    """
    if not isinstance(engine, AdapterEngine):
        kind = getattr(engine, "kind", type(engine).__name__)
        raise AdapterRefused(f"its base runs in the engine {kind}, which has no adapters.")
