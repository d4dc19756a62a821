"""The state of a model's modules as it was after loading.

Some modules keep what an earlier forward computed: the longest sequence so far, frequencies for it, a table. What is
kept there must not reach the next request.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.library.transformers_internals import HOOKED_FLAGS

_CLONED_BYTES = 1 << 20
_PLAIN = (bool, int, float, complex, str, type(None))
_IGNORED = frozenset({"training", "forward"}) | HOOKED_FLAGS
_MISSING = object()
_KEPT = "_troupe_fresh_state"


class FreshState:
    """Buffers and plain attributes of modules, to go back to.

    Parameters and attributes of other kinds are left alone, and so is what was written into a buffer of more than a
    megabyte without putting another in its place.

    Args:
        modules: in the state to go back to.

    Attributes:
        of: the first of the modules.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.of = modules[0] if modules else None
        self._kept = [_Kept(module) for module in modules]

    def reset(self) -> None:
        for kept in self._kept:
            kept.reset()


class _Kept:
    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = dict(module._buffers)
        self._attributes = _state(vars(module))
        tensors = [t for t in (*self._buffers.values(), *self._attributes.values()) if isinstance(t, Tensor)]
        small = {id(t): t for t in tensors if t.nbytes <= _CLONED_BYTES and not t.is_inference() and not t.is_meta}
        self._copies = [(t, t._version, t.clone()) for t in small.values()]

    def reset(self) -> None:
        _restore(self._module._buffers, self._buffers, self._module._buffers)
        _restore(vars(self._module), self._attributes, _state(vars(self._module)))
        for i, (tensor, version, copy) in enumerate(self._copies):
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(copy)
                self._copies[i] = (tensor, tensor._version, copy)


def _state(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes that can be put back."""
    return {k: v for k, v in attributes.items() if isinstance(v, (Tensor, *_PLAIN)) and k not in _IGNORED}


def _restore(target: dict[str, Any], fresh: dict[str, Any], now: dict[str, Any]) -> None:
    """Put back what has changed, and take out what has come since."""
    for name in [name for name in now if name not in fresh]:
        del target[name]
    for name, value in fresh.items():
        if target.get(name, _MISSING) is not value:
            target[name] = value


def fresh_state(model: Any) -> FreshState:
    """The state of all of a model's modules when this was first called for it; nothing if it is not a module."""
    if not isinstance(model, nn.Module):
        return FreshState()
    # Kept by the model itself: it refers to the modules, and goes with them. A shallow copy has attributes of its own.
    known = vars(model).get(_KEPT)
    if isinstance(known, FreshState) and known.of is model:
        return known
    found = vars(model)[_KEPT] = FreshState(*model.modules())
    return found
