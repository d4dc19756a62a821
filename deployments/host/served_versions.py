"""Which versions of the models a process serves: the newest of each, and those that still have a place."""

from __future__ import annotations

from deployments.host.leases import LeaseStats
from deployments.registry.version import Version


class ServedVersions:
    """The versions of one process's models."""

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
