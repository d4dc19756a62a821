"""How much of its weights a model has loaded, by transformers' own progress bar."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from transformers.utils.logging import set_tqdm_hook

_BAR = "Loading weights"
_loading = threading.local()
_parts: dict[str, float] = {}


@contextlib.contextmanager
def counted_weights(key: str) -> Iterator[None]:
    """While a loader runs in this thread: its weights count as those of a model."""
    set_tqdm_hook(_bar)
    _loading.key = key
    try:
        yield
    finally:
        del _loading.key
        _parts.pop(key, None)


def loaded_parts() -> dict[str, float]:
    """The part of its weights, 0 to 1, that each model has which loads now, if it is known."""
    return dict(_parts)


def _bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """transformers' hook in place of a progress bar."""
    key = getattr(_loading, "key", None)
    if key is None or kwargs.get("desc") != _BAR or not args or not isinstance(args[0], Collection):
        return factory(*args, **kwargs)
    return _counted(key, args[0])


def _counted(key: str, weights: Collection[Any]) -> Iterator[Any]:
    for number, weight in enumerate(weights):
        _parts[key] = number / len(weights)
        yield weight
    _parts[key] = 1.0
