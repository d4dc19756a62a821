"""Python that a loader has put into a model's forward: hooks, patched forwards, parametrizations.

It has to run at every forward. A step that is replayed, or compiled once for all, does not run it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrize

from deployments.engine.library.transformers_internals import HOOKING_MODULES

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks")
# Accelerate and we replace forwards.
_KNOWN = (*HOOKING_MODULES, "deployments.engine.")


def listener(model: nn.Module) -> str | None:
    """What runs within the model's forward, in words with the module's name; None if nothing does."""
    if any(getattr(torch_modules, name) for name in _GLOBAL):
        return "a forward hook is registered for all modules"
    return next((f"module {name} has {what}" for name, _, what in listening(model)), None)


def listening(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The modules that something is attached to: their names, they themselves, and what it is."""
    for name, module in model.named_modules():
        what = _what(module)
        if what is not None:
            yield name or type(module).__name__, module, what


def free_hooks(model: nn.Module) -> list[Any]:
    """The hook tables of all modules that are empty, to see later whether they still are."""
    tables = [getattr(module, name) for module in model.modules() for name in _HOOKS]
    return [table for table in [*tables, *(getattr(torch_modules, name) for name in _GLOBAL)] if not table]


def _what(module: nn.Module) -> str | None:
    if any(not _known(hook) for name in _HOOKS for hook in getattr(module, name).values()):
        return "a forward hook"
    patched = vars(module).get("forward")
    if patched is not None and not _known(patched) and not hasattr(module, "_hf_hook"):
        return "a forward that replaces its class's"
    return "a parametrization" if parametrize.is_parametrized(module) else None


def _known(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_KNOWN)
