"""Paths as clients write them: a base URL that ends with a slash doubles one, and some clients add one at the end."""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import Scope

_SLASHES = re.compile("/{2,}")


def route_path(scope: Scope) -> str:
    """The path that the routes see, whatever prefix the application is served under."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def accepts(scope: Scope, media_type: str) -> bool:
    """Whether a client names this type, and does not prefer JSON (RFC 9110, 12.5.1)."""
    weights = dict(map(_weighted, Headers(scope=scope).get("accept", "").lower().split(",")))
    return weights.get(media_type, 0) > 0 and weights[media_type] >= weights.get("application/json", 0)


def _weighted(part: str) -> tuple[str, float]:
    media_type, *parameters = (text.strip() for text in part.split(";"))
    weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
    return media_type, float(weight) if re.fullmatch(r"[01](\.\d{0,3})?", weight) else 0.0


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
