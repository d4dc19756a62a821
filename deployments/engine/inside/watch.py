"""Everything that the modules of a model give and are given in one forward; for measuring, not for serving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from deployments.engine.inside.layout import Side, first_argument, items
from deployments.engine.library.transformers_internals import HOOKED_FLAGS
from deployments.engine.model.attention import AttentionCall, watched_attention

Place = tuple[nn.Module, Side, int]
"""A module, a side, and which of its tensors."""
Seen = dict[Place, list[Tensor]]
"""Copies of the tensors at each place, one for each call."""


@contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """What passes through the modules of a model meanwhile, in this thread. Hooks that are left are removed."""
    seen: Seen = {}

    def note(module: nn.Module, side: Side, index: int, value: Tensor) -> None:
        seen.setdefault((module, side, index), []).append(value.detach().clone())

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        found = first_argument(args, kwargs)
        if found is not None:
            note(module, "input", 0, found[1])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for index, value in enumerate(items(output)):
            if value is not None:
                note(module, "output", index, value)

    def attended(call: AttentionCall) -> None:
        known = not call.extras
        note(call.module, "attention", 0, call.query.new_empty(call.query.shape[1] if known else 0))

    with ExitStack() as stack:
        stack.enter_context(_without_new_hooks(model))
        stack.enter_context(watched_attention(attended))
        for module in model.modules():
            if module is not model:
                stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(after))
        yield seen


@contextmanager
def _without_new_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the hooks that are registered meanwhile: transformers leaves its own, to collect hidden states."""
    modules = list(model.modules())
    hooks = [dict(module._forward_hooks) for module in modules]
    flags = [{name: getattr(module, name) for name in HOOKED_FLAGS if name in vars(module)} for module in modules]
    try:
        yield
    finally:
        for module, known, flagged in zip(modules, hooks, flags, strict=True):
            for key in module._forward_hooks.keys() - known.keys():
                del module._forward_hooks[key]
            for name in HOOKED_FLAGS & vars(module).keys() - flagged.keys():
                delattr(module, name)
