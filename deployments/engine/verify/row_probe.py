"""Which modules see sequences: the first dimension of their input is that of the batch.

Experts see the tokens that were routed to them, and some models flatten their batch. Sequences of several adapters
cannot be told apart there, so an adapter on such a module is computed by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.cache.cache import new_cache
from deployments.engine.model.forward import NO_OFFSET, Forward
from deployments.engine.model.patches import Patches
from deployments.engine.verify.length_probe import LengthProbe

logger = logging.getLogger("troupe.engine")

_DECODED, _PREFILLED, _LENGTH = 3, 2, 4


def mixing_modules(forward: Forward, modules: Mapping[str, nn.Module], *, groups: bool) -> Collection[str]:
    """Which of some modules see sequences in a decode step of three, and in a prefill of two.

    A module that neither calls is called for one sequence at a time, as an encoder is.

    Args:
        forward: of the model that has the modules.
        groups: several prompts are computed in one forward.
    """
    watch = _Watch()
    try:
        with torch.inference_mode(), Patches() as patches:
            for name, module in modules.items():
                patches.replace_forward(module, watch.forward_of(name, module))
            _run(forward, watch, groups)
    except Exception as error:
        logger.info("Modules cannot be watched (%s: %s): adapters run one at a time.", type(error).__name__, error)
        return ()
    return set(modules) - watch.others


class _Watch:
    """The modules that were called with something else than `rows` sequences; 0 watches nothing."""

    def __init__(self) -> None:
        self.rows = 0
        self.others: set[str] = set()

    def forward_of(self, name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward
        dims = 2 if isinstance(module, nn.Embedding) else 3

        def watched(input: Tensor, *args: Any, **kwargs: Any) -> Any:
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
