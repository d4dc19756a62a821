"""Which token ids a model has."""

from __future__ import annotations

from typing import Any


def vocab_size(model: Any) -> int | None:
    """How many token ids the model's input embedding has; None if it cannot be told."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return int(weight.shape[0]) if weight.dim() == 2 else None


def id_range(vocab: int | None) -> str:
    """The ids of a vocabulary in words."""
    return "ids of 0 and more" if vocab is None else f"the model's ids 0 to {vocab - 1}"
