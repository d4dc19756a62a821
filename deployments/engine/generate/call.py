"""The model's `generate` as the engine calls it.

Most models have transformers' own function. Others bring one around it, which may run several models in turn, read
limits under names of its own, or pass on to the inner `generate` only some of what it is given.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from transformers import GenerationMixin

from deployments.engine.library.transformers_internals import fill_defaults
from deployments.engine.model.fresh_state import fresh_state
from deployments.engine.model.neutral_config import neutral_view

# An id beyond every vocabulary: the engine alone ends a text.
NEVER = 1 << 40
# Parameters of functions that also speak, and the value with which they only write.
_SILENT = {"return_audio": False, "generate_speech": False, "generation_mode": "text"}
_LIMIT = "_max_new_tokens"


class GenerateCall:
    """Calls a model's `generate` so that the engine alone decides what is sampled and when a text ends.

    The modules' state is the one after loading whenever a call begins: nothing of an earlier one reaches it.

    Args:
        model: a transformers model with `generate`.
        static_cache: keep the KV cache at its full length from the start.

    Attributes:
        view: the model with a neutral generation_config, weights shared.
        wraps: the model's function is not transformers' own.
        plain: transformers' function is called in any case.
    """

    def __init__(self, model: Any, *, static_cache: bool = False) -> None:
        fresh_state(model).reset()
        self.view = neutral_view(model, NEVER)
        self._fresh = fresh_state(self.view)
        if static_cache:
            self.view.generation_config.cache_implementation = "static"
        self._main_input = str(model.main_input_name)
        self.wraps = getattr(type(model), "generate", None) is not GenerationMixin.generate
        self.plain = False
        self._others = _others(model.generate) if self.wraps else {}
        self._takes_config = self.wraps and _takes_config(model.generate)

    def __call__(self, *, max_new_tokens: int, **kwargs: Any) -> Any:
        """Generate up to a number of tokens; what `generate` returns."""
        self._fresh.reset()
        if self.plain or not self.wraps or self._hears(kwargs):
            return GenerationMixin.generate(self.view, max_new_tokens=max_new_tokens, **kwargs)
        limits = {name: max_new_tokens for name in self._others if name.endswith(_LIMIT)}
        others = {**self._others, **limits, **kwargs}
        if not self._takes_config:
            return self.view.generate(max_new_tokens=max_new_tokens, **others)
        config = copy.deepcopy(self.view.generation_config)
        # A model inside has a generation_config of its own, which counts for what this one leaves open.
        fill_defaults(config)
        config.max_new_tokens = max_new_tokens
        return self.view.generate(generation_config=config, **others)

    def _hears(self, kwargs: dict[str, Any]) -> bool:
        """A recording with a decoder's prompt: Whisper's own function cuts it into windows and tries again."""
        return "decoder_input_ids" in kwargs and self._main_input in kwargs and self._main_input != "input_ids"


def _others(generate: Any) -> dict[str, Any]:
    """Arguments for a function that generates more than a text, or under names of its own."""
    names = inspect.signature(generate).parameters
    found: dict[str, Any] = {name: value for name, value in _SILENT.items() if name in names}
    for name in names:
        if name.endswith(_LIMIT):
            found.update({name: 1, name.removesuffix(_LIMIT) + "_eos_token_id": NEVER})
            # Some read it from **kwargs; one with another switch may not know it.
            found.update({} if _SILENT.keys() & names.keys() else {"generation_mode": "text"})
    return found


def _takes_config(generate: Any) -> bool:
    parameters = inspect.signature(generate).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return open_ended or "generation_config" in parameters
