"""Paths as clients write them: a base URL that ends with a slash doubles one, and some clients add one at the end."""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.types import Scope

_SLASHES = re.compile("/{2,}")


def route_path(scope: Scope) -> str:
    """The path that the routes see, whatever prefix the application is served under."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


class TidyPaths:
    """Removes doubled and trailing slashes, except those that belong to a model's name.

    Args:
        names: ids and aliases of all models.
    """

    def __init__(self, names: Iterable[str]) -> None:
        odd = sorted((name for name in names if _tidy(f"/{name}") != f"/{name}"), key=len, reverse=True)
        self._kept = re.compile(f"/+((?:models|engines)/(?:{'|'.join(map(re.escape, odd))}))(?=/|$)") if odd else None

    def scope(self, scope: Scope) -> Scope:
        """The scope of the same request under its tidy path."""
        path = self.path(route_path(scope))
        return {**scope, "path": scope.get("root_path", "") + path}

    def path(self, path: str) -> str:
        """The tidy form of a path."""
        if self._kept is None:
            return _tidy(path)
        pieces = self._kept.split(path)
        texts = [f"/{piece}" if i % 2 else _SLASHES.sub("/", piece) for i, piece in enumerate(pieces)]
        return "".join([*texts[:-1], texts[-1].rstrip("/")]) or "/"


def _tidy(path: str) -> str:
    return _SLASHES.sub("/", path).rstrip("/") or "/"
