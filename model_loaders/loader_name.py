"""Names of loaders, as a configuration has them: `module:function` or `path/to/file.py:function`."""

from __future__ import annotations

_MOVED = {
    "model_loaders.ctranslate2": "model_loaders.backends.ctranslate2",
    "model_loaders.triton": "model_loaders.backends.triton",
    "model_loaders.fuyu": "model_loaders.examples.fuyu",
    "model_loaders.paligemma": "model_loaders.examples.paligemma",
    "model_loaders.simulated": "model_loaders.examples.simulated",
}


def parts(loader: str) -> tuple[str, str]:
    """The module or file of a loader, and the name in it: by default `model_info`."""
    place, _, name = loader.rpartition(":") if ":" in loader else (loader, "", "model_info")
    return place, name


def is_file(place: str) -> bool:
    """Whether a loader is in a file that is named by its path, not in a module."""
    return place.endswith(".py") or "/" in place


def new_place(loader: str) -> str | None:
    """The name that a loader of an earlier version (`module:function`) has now; None if it has not moved."""
    module, colon, function = loader.partition(":")
    module = module.removesuffix(".py").replace("/", ".")
    return f"{_MOVED[module]}{colon}{function}" if module in _MOVED else None
