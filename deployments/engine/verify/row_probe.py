"""How a model calls its modules, which says how adapters on them can be computed.

The first dimension of what a module sees should be that of the batch. Experts see the tokens that were routed to them,
and some models flatten their batch. Sequences of several adapters cannot be told apart there, so an adapter on such a
module is computed by itself. A module whose parent reads its weight and does not call it, as in a fused kernel, cannot
have an adapter: it would have no effect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.adapters.table import Watched
from deployments.engine.cache.cache import new_cache
from deployments.engine.model.forward import NO_OFFSET, Forward
from deployments.engine.model.patches import Patches
from deployments.engine.verify.length_probe import LengthProbe

logger = logging.getLogger("troupe.engine")

_DECODED, _PREFILLED, _LENGTH = 3, 2, 4


def watch_modules(forward: Forward, modules: Mapping[str, nn.Module], *, groups: bool) -> Watched:
    """How some modules are called in a prefill, in a decode step of three sequences, and in a prefill of two.

    Args:
        forward: of the model that has the modules.
        groups: several prompts are computed in one forward.
    """
    watch = _Watch()
    try:
        with torch.inference_mode(), Patches() as patches:
            for name in modules:
                parent = forward.model.get_submodule(name.rpartition(".")[0])
                if id(parent) not in watch.parents:
                    watch.parents.add(id(parent))
                    patches.replace_forward(parent, watch.forward_of_parent(parent))
            for name, module in modules.items():
                patches.replace_forward(module, watch.forward_of(name, module))
            _run(forward, watch, groups)
    except Exception as error:
        logger.info("Modules cannot be watched (%s: %s): adapters run one at a time.", type(error).__name__, error)
        return Watched(frozenset(), frozenset())
    bypassed = {
        name
        for name in modules
        if name not in watch.called and id(forward.model.get_submodule(name.rpartition(".")[0])) in watch.called_parents
    }
    # A module that is not called is called for one sequence at a time, as an encoder of images is.
    return Watched(frozenset(set(modules) - watch.others), frozenset(bypassed))


class _Watch:
    """What was called, and the modules that were called with something else than `rows` sequences; 0 asks for none."""

    def __init__(self) -> None:
        self.rows = 0
        self.others: set[str] = set()
        self.called: set[str] = set()
        self.parents: set[int] = set()
        self.called_parents: set[int] = set()

    def forward_of_parent(self, parent: nn.Module) -> Callable[..., Any]:
        forward = parent.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.called_parents.add(id(parent))
            return forward(*args, **kwargs)

        return watched

    def forward_of(self, name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward
        dims = 2 if isinstance(module, nn.Embedding) else 3

        def watched(input: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.called.add(name)
            if self.rows and not (input.dim() >= dims and input.shape[0] == self.rows):
                self.others.add(name)
            return forward(input, *args, **kwargs)

        return watched


def _run(forward: Forward, watch: _Watch, groups: bool) -> None:
    probe = LengthProbe(forward, _LENGTH + 1, _LENGTH)
    cache, _ = probe.alone(probe.long)
    for _ in range(_DECODED - 1):
        cache.append(cache.copy_sequence(0), 0)
    watch.rows = _DECODED
    forward.decode(probe.short[:_DECODED], [NO_OFFSET] * _DECODED, cache)
    if groups and not forward.is_encoder_decoder:
        watch.rows = _PREFILLED
        forward.prefill([probe.short] * _PREFILLED, new_cache(forward.model))
