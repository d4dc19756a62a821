"""The models that come while the server runs: from watched folders, from the Hub, by `POST /admin/models`.

One registry serves all ingresses. They follow its changes, and ask it for a name that they do not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol
from uuid import uuid4

from deployments.adapters.refused import AdapterRefused
from deployments.config.app import AppArgs, unknown_model
from deployments.config.model import ModelEntry
from deployments.config.sources import Spec, spec_like
from deployments.core.errors import ModelNotFound, NameTaken, Unavailable
from deployments.registry.adapter_check import AdapterCheck
from deployments.registry.catalogue import named_entry
from deployments.registry.folders import FolderSearch, Found
from deployments.registry.posted import EntryFaults, hub_allows, posted_file, posted_spec

logger = logging.getLogger("troupe.registry")

_FRESH_S = 0.5

Changes = tuple[str, Sequence[Spec]]


class ModelRegistry(Protocol):
    """What an ingress asks of the registry. Its errors are those of `deployments.core.errors`."""

    async def find(self, name: str) -> Spec | None:
        """The model of this id or alias; None if there is none.

        Raises:
            Unavailable: its folder is being written.
            ModelNotFound: its folder is refused.
        """

    async def changes(self, seen: str, limit: float) -> Changes:
        """All models and what to pass as `seen` the next time; waits up to `limit` seconds for a change."""

    async def check(self, body: Mapping[str, Any]) -> Spec | None:
        """The model that `add` would add; None if it is there already. See `add` for its errors."""

    async def add(self, body: Mapping[str, Any]) -> tuple[Spec, bool]:
        """Add the model that a request describes, and whether it is new; see `posted_spec` and `NameTaken`."""

    async def remove(self, name: str) -> Spec:
        """Remove a model that was added; see `ModelNotFound` and `NameTaken`."""

    async def refresh(self) -> None:
        """Search all folders now."""

    async def states(self) -> list[dict[str, Any]]:
        """Every model and every folder that is not one, with its state, as JSON values."""


class Registry:
    """The registry in this process.

    Args:
        args: the application's configuration.
        faults: checks the entries of models that are added.
    """

    def __init__(self, args: AppArgs, faults: EntryFaults) -> None:
        self._args = args
        self._faults = faults
        self._configured = args.by_name()
        self._file = posted_file(args)
        self._posted = self._file.read() if args.api.admin_keys else {}
        self._hub: dict[str, Spec] = {}
        self._check = AdapterCheck()
        self._searches = [FolderSearch(source, self._configured, args.settle_s, self._check) for source in args.folders]
        self._folders: list[Found] = []
        self._searched = float("-inf")
        self._epoch, self._count = uuid4().hex, 0
        self._changed = asyncio.Event()
        self._has_searched = asyncio.Event()
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Search the folders from time to time, until cancelled."""
        while self._searches:
            try:
                await self.refresh()
            except Exception:
                logger.exception("searching for folders failed")
            self._has_searched.set()
            await asyncio.sleep(min(source.every_s for source in self._args.folders))

    async def find(self, name: str) -> Spec | None:
        if (spec := self._named(name)) is not None:
            return spec
        if self._searches and time.monotonic() - self._searched > _FRESH_S:
            await self.refresh()
        if (spec := self._named(name)) is None and self._args.hub is not None and hub_allows(self._args, name):
            hub = self._args.hub
            like = self._configured[hub.like]
            spec = spec_like(like, hub.like_key, name=name, source=name, origin="hub", created=int(time.time()))
            self._hub[name] = spec
            self._note_change()
        if spec is None:
            self._refuse_unready(name)
        return spec

    async def changes(self, seen: str, limit: float) -> Changes:
        if self._searches and not self._has_searched.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_searched.wait(), limit)
        if seen == self._token:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), limit)
        return self._token, list(self._specs())

    async def check(self, body: Mapping[str, Any]) -> Spec | None:
        spec = await asyncio.to_thread(posted_spec, self._args, body, self._names(), self._check, self._faults)
        known = self._posted.get(spec.entry.id)
        if known is not None and known.same(spec):
            return None
        self._refuse_taken(spec, replaces=known is not None and bool(body.get("replace")))
        self._refuse_base(spec.entry.id)
        return spec

    async def add(self, body: Mapping[str, Any]) -> tuple[Spec, bool]:
        async with self._writing:
            spec = await self.check(body)
            if spec is None:
                return self._posted[body["id"]], False
            await self._keep({**self._posted, spec.entry.id: spec})
        return spec, True

    async def remove(self, name: str) -> Spec:
        async with self._writing:
            spec = next((spec for spec in self._posted.values() if name in spec.entry.names), None)
            if spec is None:
                if name in self._configured or name in self._names():
                    raise NameTaken(
                        f"The model {name!r} was not added by POST /admin/models: {_removal(self._names().get(name))}."
                    )
                raise unknown_model(name, [*self._args.models, *(spec.entry for spec in self._specs() if spec.listed)])
            self._refuse_base(spec.entry.id)
            await self._keep({key: value for key, value in self._posted.items() if key != spec.entry.id})
        return spec

    async def refresh(self) -> None:
        before = [(found.spec.entry.id, found.state) for found in self._folders]
        found = await asyncio.to_thread(lambda: [found for search in self._searches for found in search.search()])
        self._folders, self._searched = found, time.monotonic()
        if before != [(each.spec.entry.id, each.state) for each in found]:
            self._note_change()

    async def states(self) -> list[dict[str, Any]]:
        rows = [await asyncio.to_thread(self._configured_state, entry) for entry in self._args.models]
        rows += [state_of(spec, "ready") for spec in (*self._posted.values(), *self._hub.values())]
        serving = {spec.entry.id: spec for spec in self._specs()}
        for found in self._folders:
            taken = found.state == "ready" and serving.get(found.spec.entry.id) is not found.spec
            reason = f"The name {found.spec.entry.id!r} is that of another model." if taken else found.reason
            rows.append(state_of(found.spec, "refused" if taken else found.state, reason))
        return rows

    @property
    def _token(self) -> str:
        return f"{self._epoch}-{self._count}"

    def _specs(self) -> Iterator[Spec]:
        """The models that can be requested; of two with one name, the first that was configured."""
        taken = set(self._configured)
        ready = [found.spec for found in self._folders if found.state == "ready"]
        gone = [found.spec.model_copy(update={"listed": False}) for found in self._folders if found.state == "gone"]
        for spec in (*self._posted.values(), *ready, *gone, *self._hub.values()):
            if not taken.intersection(spec.entry.names):
                taken.update(spec.entry.names)
                yield spec

    def _names(self) -> dict[str, Spec]:
        return {name: spec for spec in self._specs() for name in spec.entry.names}

    def _named(self, name: str) -> Spec | None:
        """The model of a name; see `named_entry`."""
        specs = self._names()
        entry = named_entry(name, {**self._configured, **{key: spec.entry for key, spec in specs.items()}})
        return None if entry is None else specs.get(entry.id)

    def _configured_state(self, entry: ModelEntry) -> dict[str, Any]:
        """The state of a model of the configuration. Blocks."""
        reason = self._check.reason(entry)
        spec = Spec(entry=entry, origin="yaml", like=entry.id, source=entry.adapter or "")
        return state_of(spec, "ready" if reason is None else "refused", reason)

    def _refuse_base(self, model: str) -> None:
        """Refuse to remove or to replace a model that adapters need."""
        over = [spec.entry.id for spec in self._posted.values() if spec.entry.base == model]
        if over:
            raise NameTaken(f"The model {model!r} is the base of {', '.join(over)}; remove these first.")

    def _refuse_unready(self, name: str) -> None:
        """Say of a folder's name why it is not a model; the reason has paths, which are not for every client."""
        for found in self._folders:
            if found.spec.entry.id == name and found.state == "settling":
                raise Unavailable(f"The model {name!r} is being written; try again.", retry_after=5)
            if found.spec.entry.id == name:
                if found.for_clients and found.reason is not None:
                    raise AdapterRefused(found.reason).named(name)
                raise ModelNotFound(f"The model {name!r} is refused; GET /admin/models says why.", param="model")

    def _refuse_taken(self, spec: Spec, *, replaces: bool) -> None:
        others = {name for name, other in self._names().items() if other.entry.id != spec.entry.id or not replaces}
        for name in spec.entry.names:
            if name in others or name in self._configured:
                fix = "send replace: true to replace it" if spec.entry.id in self._posted else "choose another name"
                param = "id" if name == spec.entry.id else "aliases"
                raise NameTaken(f"The name {name!r} is that of another model; {fix}.", param=param)

    async def _keep(self, posted: dict[str, Spec]) -> None:
        await asyncio.to_thread(self._file.write, posted)
        self._posted = posted
        self._note_change()

    def _note_change(self) -> None:
        self._count += 1
        self._changed.set()
        self._changed = asyncio.Event()


def _removal(spec: Spec | None) -> str:
    """How a model that was not added is removed."""
    if spec is None:
        return "it is in the configuration; remove it there"
    if spec.origin == "folder":
        return f"it is served because its folder is watched; move or delete {spec.source}"
    return "it is on the Hub, and hub.allow in the configuration allows its name"


def state_of(spec: Spec, state: str, reason: str | None = None) -> dict[str, Any]:
    """A model as `GET /admin/models` shows it."""
    return {
        "model": spec.entry.id,
        "kind": "model" if spec.entry.base is None else "adapter",
        "aliases": spec.entry.aliases,
        "parent": spec.entry.base,
        "origin": spec.origin,
        "like": None if spec.origin == "yaml" or spec.entry.base is not None else spec.like,
        "source": spec.source or None,
        "state": state,
        "reason": reason,
    }
