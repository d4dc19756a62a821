"""The models by their names: the one place where a name becomes a model, and a model its version."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from deployments.config.app import AppArgs, unknown_model
from deployments.config.model import ModelEntry
from deployments.core.model_card import ModelCard
from deployments.registry.files import model_files
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
        self._by_name = args.by_name()
        self._cards = {entry.id: replace(entry.card, max_model_len=entry.engine.max_model_len) for entry in args.models}
        self._watches = {entry.id: Watch(entry, args.settle_s) for entry in args.models if entry.id not in given}

    def models(self) -> Sequence[ModelCard]:
        """Every model, in the order of the configuration; its limits and its fingerprint once it was loaded."""
        return list(self._cards.values())

    def entry(self, name: str) -> ModelEntry:
        """The model with this id or alias.

        Raises:
            ModelNotFound: there is none.
        """
        entry = self._by_name.get(name)
        if entry is None:
            raise unknown_model(name, self._args)
        return entry

    def resolve(self, name: str) -> ModelCard:
        """What clients see of the model with this id or alias; see `entry` for its errors."""
        return self._cards[self.entry(name).id]

    def learn(self, model: str, *, max_model_len: int, fingerprint: str) -> None:
        """Remember what the model's last version has told of itself."""
        card = self._cards[model]
        if (card.max_model_len, card.fingerprint) != (max_model_len, fingerprint):
            self._cards[model] = replace(card, max_model_len=max_model_len, fingerprint=fingerprint)

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


def date_models(args: AppArgs) -> None:
    """Set when each model was made, for `created` in /v1/models: the time of its newest file, if it lies here."""
    base = Path(args.folder or "")
    for entry in args.models:
        written = Stamp.of_files(model_files(entry.kwargs, hub=True, base=base)).written_at
        if written:
            entry.date(written)
