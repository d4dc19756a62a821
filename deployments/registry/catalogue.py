"""The models by their names: the one place where a name becomes a model, and a model its version."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deployments.config.app import AppArgs, unknown_model
from deployments.config.model import ModelEntry
from deployments.config.sources import Spec
from deployments.core.errors import ModelNotFound
from deployments.core.model_card import ModelCard
from deployments.registry.digest import json_digest
from deployments.registry.files import entry_files
from deployments.registry.stamp import Stamp
from deployments.registry.version import Version
from deployments.registry.watch import Watch


class Catalogue:
    """The models of a configuration, and what was learned of them.

    Args:
        args: the application's configuration.
        given: ids of models that are in memory already: they have one version.
    """

    def __init__(self, args: AppArgs, given: Collection[str] = ()) -> None:
        self._args = args
        self._configured = args.by_name()
        self._by_name = dict(self._configured)
        self._entries = {entry.id: entry for entry in args.models}
        self._found: dict[str, Spec] = {}
        self._cards = {entry.id: _card(entry) for entry in args.models}
        self._watches = {entry.id: Watch(entry, args.settle_s) for entry in args.models if entry.id not in given}

    def models(self) -> Sequence[ModelCard]:
        """Every model, in the order of the configuration and then of the registry; its limits and its fingerprint once
        it was loaded.
        """
        return [self._cards[entry.id] for entry in self.listed()]

    def listed(self) -> list[ModelEntry]:
        """The entries of `models`."""
        return [*self._args.models, *(spec.entry for spec in self._found.values() if spec.listed)]

    def spec(self, model: str) -> Spec | None:
        """How a model was found while the server runs; None for one of the configuration."""
        return self._found.get(model)

    def adopt(self, spec: Spec) -> None:
        """Know a model that was found while the server runs; it replaces one of the same id."""
        entry = spec.entry
        if spec.parent is not None and spec.parent.entry.id not in self._found:
            self.adopt(spec.parent)
        known = self._found.get(entry.id)
        if self._configured.keys() & set(entry.names):
            return
        self._found[entry.id] = spec
        if known is not None and known.same(spec):
            return
        if known is not None:
            self._drop_names(known)
        self._by_name.update(dict.fromkeys(entry.names, entry))
        self._entries[entry.id] = entry
        self._cards[entry.id] = replace(_card(entry), configured=False, created=spec.created)
        self._watches[entry.id] = Watch(entry, self._args.settle_s, json_digest(entry.model_dump(mode="json")))

    def follow(self, specs: Sequence[Spec]) -> None:
        """Know these models that were found while the server runs, in this order, and no others."""
        for name in self._found.keys() - {spec.entry.id for spec in specs}:
            self._drop_names(self._found.pop(name))
        for spec in specs:
            self.adopt(spec)
        self._found = {spec.entry.id: spec for spec in specs if spec.entry.id in self._found}

    def drop(self, spec: Spec) -> None:
        """Know a model no more."""
        if self._found.pop(spec.entry.id, None) is not None:
            self._drop_names(spec)

    def _drop_names(self, spec: Spec) -> None:
        for name in spec.entry.names:
            self._by_name.pop(name, None)

    def entry(self, name: str) -> ModelEntry:
        """The model with this id or alias, or the adapter with the name `base:adapter`.

        Raises:
            ModelNotFound: there is none.
        """
        entry = named_entry(name, self._by_name)
        if entry is None:
            raise unknown_model(name, self.listed())
        return entry

    def place_of(self, model: str) -> str:
        """The id of the model that is loaded for this one: of an adapter, that of its base."""
        entry = self._entries.get(model)
        return model if entry is None else entry.base or entry.id

    def entry_of(self, model: str) -> ModelEntry:
        """The model of this id, which requests may be using though it was removed."""
        return self._entries[model]

    def check_present(self, model: str) -> None:
        """Refuse to load a model that was found in a folder which is gone.

        Raises:
            ModelNotFound: it is gone.
        """
        spec = self._found.get(model)
        if (
            spec is not None
            and spec.origin in ("folder", "post")
            and "/" in spec.source
            and not Path(spec.source).exists()
        ):
            raise ModelNotFound(f"The model {model!r} is gone: its folder {spec.source} does not exist.", param="model")

    def resolve(self, name: str) -> ModelCard:
        """What clients see of the model with this id or alias; see `entry` for its errors."""
        entry = self.entry(name)
        card = self._cards[entry.id]
        if name not in entry.variants:
            return card
        return replace(card, options=replace(card.options, default_params=entry.defaults(name)), variant=name)

    def learn(self, model: str, max_model_len: int, fingerprint: str, answers: Mapping[str, Any] | None = None) -> None:
        """Remember what the model's last version has told of itself."""
        card = self._cards[model]
        learned = replace(card, max_model_len=max_model_len, fingerprint=fingerprint, answers=answers)
        if card != learned:
            self._cards[model] = learned

    async def version(self, model: str) -> Version:
        """The version of a model now; see `Watch.current` for its errors."""
        watch = self._watches.get(model)
        return Version(model=model) if watch is None else await watch.current()

    async def is_current(self, version: Version) -> bool:
        """Whether the files of a version are unchanged at this moment."""
        watch = self._watches.get(version.model)
        return watch is None or await watch.is_current(version)

    def expire(self, model: str) -> None:
        """Look at the files of a model at its next request."""
        if model in self._watches:
            self._watches[model].expire()


def named_entry(name: str, known: Mapping[str, ModelEntry]) -> ModelEntry | None:
    """The entry of a name, which may be that of an adapter after a name of its base and a colon."""
    if name in known:
        return known[name]
    base, colon, adapter = name.rpartition(":")
    if not colon or base not in known or adapter not in known:
        return None
    return known[adapter] if known[adapter].base == known[base].id else None


def _card(entry: ModelEntry) -> ModelCard:
    return replace(entry.card, max_model_len=entry.engine.max_model_len)


def date_models(args: AppArgs) -> None:
    """Set when each model was made, for `created` in /v1/models: the time of its newest file, if it lies here."""
    base = Path(args.folder or "")
    for entry in args.models:
        written = Stamp.of_files(entry_files(entry, hub=True, base=base)).written_at
        if written:
            entry.date(written)
