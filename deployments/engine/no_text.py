"""The engine of a model that has no head for text: an encoder, or a base model, which only gives embeddings."""

from __future__ import annotations

from typing import Any

import torch

from deployments.adapters.lora_file import LoraFile
from deployments.config.engine import EngineOptions
from deployments.core.errors import UnsupportedParameter
from deployments.engine.adapters.table import AdapterTable, PlacedAdapter
from deployments.engine.base.admission import ALL_PARAMS, context_length
from deployments.engine.base.protocol import Emit, EngineRequest
from deployments.engine.base.threaded import ThreadedEngine
from deployments.engine.model.rotary import SequenceRotary
from model_loaders.contract import ModelInfo


def gives_text(info: ModelInfo) -> bool:
    """Whether a model can continue a prompt: it has `generate`, of its own or as a hook."""
    model: Any = info.model
    known = hasattr(model, "config") and hasattr(model, "get_input_embeddings")
    return info.generate is not None or callable(getattr(model, "generate", None)) or not (known or info.embed)


class NoTextEngine(ThreadedEngine):
    """Refuses every request for text. See `protocol.Engine`."""

    kind = "embeddings"

    def __init__(self, info: ModelInfo, options: EngineOptions) -> None:
        super().__init__()
        self.max_model_len = context_length(info, options)
        self.supports = ALL_PARAMS
        # Each text gets the rotary frequencies of its own length, whatever was embedded before.
        SequenceRotary(info.model, self.max_model_len)
        self.adapters = AdapterTable(info.model)
        self._name = info.label
        self._class = type(info.model).__name__

    def add_adapter(self, key: str, file: LoraFile, dtype: torch.dtype = torch.float32) -> PlacedAdapter:
        """See `protocol.AdapterEngine`."""
        return self.adapters.add(key, self.adapters.fit(file, dtype))

    def remove_adapter(self, key: str) -> None:
        """See `protocol.AdapterEngine`."""
        self.adapters.remove(key)

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        raise self.refusal(self._name)

    def refusal(self, model: str) -> UnsupportedParameter:
        """The error for a request for text; it names the model's class.

        Args:
            model: its id.
        """
        return UnsupportedParameter(
            f"Model {model!r} is a {self._class}, which has no head for text: it gives embeddings "
            "(/v1/embeddings). If its checkpoint has such a head, name the class with it in the loader's auto_class.",
            param="model",
            code="text_unsupported",
        )
