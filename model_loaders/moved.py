"""Loaders of earlier versions that have a new place."""

from __future__ import annotations

_MOVED = {
    "model_loaders.ctranslate2": "model_loaders.backends.ctranslate2",
    "model_loaders.triton": "model_loaders.backends.triton",
    "model_loaders.fuyu": "model_loaders.examples.fuyu",
    "model_loaders.paligemma": "model_loaders.examples.paligemma",
    "model_loaders.simulated": "model_loaders.examples.simulated",
}


def new_place(loader: str) -> str | None:
    """The name that a loader of an earlier version (`module:function`) has now; None if it has not moved."""
    module, colon, function = loader.partition(":")
    module = module.removesuffix(".py").replace("/", ".")
    return f"{_MOVED[module]}{colon}{function}" if module in _MOVED else None
