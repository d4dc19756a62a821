"""A catalogue that follows a registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deployments.config.sources import Spec
from deployments.core.errors import TroupeError, Unavailable, UnsupportedParameter
from deployments.registry.catalogue import Catalogue
from deployments.registry.registry import ModelRegistry, state_of
from deployments.registry.trial import Trials, try_model

logger = logging.getLogger("troupe.registry")

_LIMIT_S = 20.0
_AGAIN_S = 0.5
_REMEMBERED = 10_000


class Following:
    """Keeps the models of a catalogue as a registry has them, and asks it for names that the catalogue does not know.

    Args:
        catalogue: of this process.
        registry: of the application.
    """

    def __init__(self, catalogue: Catalogue, registry: ModelRegistry) -> None:
        self._catalogue = catalogue
        self.registry = registry
        self._has_models = False
        self._task: asyncio.Task[None] | None = None
        self._unknown: dict[str, float] = {}

    def start(self) -> None:
        """Follow from now on; needs a running event loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._follow(), name="follow the registry")

    def check(self) -> None:
        """Raise Unavailable until the registry has said which models there are."""
        if not self._has_models:
            raise Unavailable("The server is searching its folders for models; try again.", retry_after=1)

    async def close(self) -> None:
        """Follow no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def discover(self, name: str) -> bool:
        """Whether the registry has a model of this name, which the catalogue has now too.

        Raises:
            Unavailable: the registry does not answer.
        """
        if time.monotonic() - self._unknown.get(name, float("-inf")) < _AGAIN_S:
            return False
        spec = await self.registry.find(name)
        if spec is None:
            if len(self._unknown) >= _REMEMBERED:
                self._unknown.clear()
            self._unknown[name] = time.monotonic()
            return False
        self._catalogue.adopt(spec)
        return True

    async def add(self, body: Mapping[str, Any], trials: Trials) -> tuple[dict[str, Any], bool]:
        """Add a model, and know it here; its state, and whether it is new.

        An adapter is tried on its base if that is loaded, or is to be loaded; a model is loaded first with `load`.

        Raises:
            BadRequest: it cannot be served; nothing was added or replaced.
            TroupeError: as of `ModelRegistry.add`.
        """
        if (found := await self.registry.check(body)) is not None:
            await try_model(found, body, trials)
        spec, new = await self.registry.add(body)
        self._catalogue.adopt(spec)
        return state_of(spec, "ready"), new

    async def remove(self, name: str) -> Spec:
        """Remove a model that was added, here at once; see `ModelRegistry.remove` for its errors."""
        spec = await self.registry.remove(name)
        self._catalogue.drop(spec)
        return spec

    async def states(self, replicas: Sequence[Mapping[str, Any]], *, refresh: bool) -> list[dict[str, Any]]:
        """Every model and every folder that is not one, with its state, its fingerprint and the replicas that have it.

        Args:
            replicas: their states, see `ModelClient.status`.
        """
        if refresh:
            await self.registry.refresh()
        rows = await self.registry.states()
        for row in rows:
            row["replicas"] = [held for replica in replicas for held in _held(replica, row["model"])]
            kinds = ("refused",) if row["replicas"] else ("refused", "failed")  # Another replica may have loaded it.
            known = (each[kind].get(row["model"]) for each in replicas for kind in kinds)
            reason = next(filter(None, known), None)
            if reason is not None and row["state"] == "ready":
                row.update(state="refused", reason=reason)
        return rows

    async def _follow(self) -> None:
        seen = ""
        while True:
            try:
                seen, specs = await self.registry.changes(seen, _LIMIT_S)
            except TroupeError as error:
                logger.warning("the registry does not answer: %s", error)
                await asyncio.sleep(_AGAIN_S)
            else:
                self._catalogue.follow(specs)
                self._unknown.clear()
                self._has_models = True


def _held(replica: Mapping[str, Any], model: str) -> Iterator[dict[str, str]]:
    """What a replica has of a model: on its device, or in the memory of its host."""
    loaded = [held for each in replica["models"] for held in (each, *each["adapters"])]
    for tier, found in (("device", loaded), ("host", replica["host_copies"])):
        for held in found:
            if held["id"] == model:
                name = str(replica.get("replica", "local"))
                yield {"replica": name, "tier": tier, "fingerprint": held["fingerprint"]}


def followed(following: Following | None) -> Following:
    """The registry that is followed.

    Raises:
        UnsupportedParameter: the configuration lets no models come while the server runs.
    """
    if following is None:
        raise UnsupportedParameter("This server has only the models of its configuration.")
    return following
