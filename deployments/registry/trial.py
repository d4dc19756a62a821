"""Trying a model that is to be added: what cannot be served must not take the place of what can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from deployments.adapters.refused import AdapterRefused
from deployments.config.sources import Spec
from deployments.core.errors import BadRequest, ModelLoadFailed


class Trials(Protocol):
    """The replicas, for models that the registry does not have yet."""

    async def status(self) -> Sequence[Mapping[str, Any]]:
        """One entry for every replica; see `ModelClient.status`."""

    async def try_adapter(self, spec: Spec) -> None:
        """Compare an adapter with its base, which is loaded for it. Nothing is placed.

        Raises:
            AdapterRefused: it does not fit.
        """

    async def try_load(self, spec: Spec) -> None:
        """Load a model on a replica.

        Raises:
            ModelLoadFailed: it cannot be loaded.
        """

    async def end_trial(self, spec: Spec) -> None:
        """Unload what `try_load` has loaded."""


async def try_model(spec: Spec, body: Mapping[str, Any], trials: Trials) -> None:
    """Try a model that a request describes, as far as that needs no other model to leave its place.

    Args:
        spec: see `posted_spec`.
        body: the request; with `load` or `replace`, the base of an adapter is loaded for it.

    Raises:
        BadRequest: the model or the adapter cannot be served.
    """
    load, replaces = bool(body.get("load")), bool(body.get("replace"))
    if spec.entry.base is None:
        if load:
            await _load(spec, body["model_name"], trials, replaces=replaces)
    elif load or replaces or await _is_loaded(spec.entry.base, trials):
        try:
            await trials.try_adapter(spec)
        except AdapterRefused as refused:
            raise BadRequest(f"Invalid 'adapter' {body['adapter']!r}: {refused.reason}", param="adapter") from None


async def _is_loaded(model: str, trials: Trials) -> bool:
    return any(held["id"] == model for replica in await trials.status() for held in replica["models"])


async def _load(spec: Spec, source: str, trials: Trials, *, replaces: bool) -> None:
    """Load a model; one that replaces another under a name of its own, as requests use the other until then."""
    spec = spec.model_copy(update={"listed": False})
    if replaces:
        entry = spec.entry.model_copy(update={"id": f"{spec.entry.id} (new)", "aliases": []})
        spec = spec.model_copy(update={"entry": entry})
    try:
        await trials.try_load(spec)
    except ModelLoadFailed as failed:
        raise BadRequest(f"Invalid 'model_name' {source!r}: {failed.message}", param="model_name") from None
    finally:
        if replaces:
            await trials.end_trial(spec)
