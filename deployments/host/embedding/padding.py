"""Whether texts of different lengths can be computed together without changing each other's states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from deployments.engine.model.rotary import follows_length
from deployments.engine.verify.prompts import ordinary_ids
from deployments.engine.verify.proofs import EMBEDDING

StatesOf = Callable[[Sequence[Sequence[int]]], Tensor]


def padding_is_neutral(model: Any, states_of: StatesOf) -> bool:
    """Whether a probe finds the states of padded texts equal to those of each text by itself.

    Short texts do not show whether attention or rotary frequencies follow the longest text of a forward: the config
    says the first, and `SequenceRotary` has found the second.

    Args:
        states_of: the last hidden states [batch, width, dimensions] of rows of token ids.
    """
    if follows_length(model) or _follows_width(model.config):
        return False
    rows = _rows(model)
    try:
        together = states_of(rows)
        return all(_close(together[i, : len(row)], states_of([row])[0]) for i, row in enumerate(rows))
    except Exception:
        return False


def is_causal(model: Any, states_of: StatesOf) -> bool:
    """Whether a probe finds that a token's state does not depend on the token after it; arguments as above."""
    row, other, *_ = _rows(model)
    states = states_of([row[:9], [*row[:8], other[0]]])
    return _close(states[0, :8], states[1, :8])


def _follows_width(config: Any) -> bool:
    """Whether what a token attends to depends on how wide the batch is."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "attention_type", None) == "block_sparse" or bool(getattr(text, "attention_window", None))


def _rows(model: Any) -> list[list[int]]:
    ids = ordinary_ids(model, 7 * len(EMBEDDING.lengths) + max(EMBEDDING.lengths))
    return [ids[7 * j :][:length] for j, length in enumerate(EMBEDDING.lengths)]


def _close(states: Tensor, expected: Tensor) -> bool:
    tolerance = EMBEDDING.tolerance.at(expected.dtype)
    largest = max(1.0, float(expected.abs().max()))
    return bool((states.float() - expected.float()).abs().max() <= tolerance * largest)
