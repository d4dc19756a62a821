"""One vector of the last hidden states of a text.

The formulas are those of sentence-transformers' Pooling module (https://sbert.net).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def pool(states: Tensor, lengths: Tensor, skipped: Tensor, poolings: Sequence[str]) -> Tensor:
    """A vector for each text of a batch.

    Args:
        states: float [batch, width, dimensions], padding at the end.
        lengths: int [batch], tokens of each text.
        skipped: int [batch], tokens at its beginning that are not pooled.
        poolings: keys of `POOLINGS`; the vectors of several are joined.

    Returns:
        float32 [batch, dimensions * len(poolings)].
    """
    positions = torch.arange(states.shape[1], device=states.device)[None]
    mask = (positions >= skipped[:, None]) & (positions < lengths[:, None])
    return torch.cat([POOLINGS[name](states.float(), mask) for name in poolings], dim=-1)


def _sum(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(~mask[..., None], 0).sum(1)


def _count(mask: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True).clamp(min=1)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    return _sum(states, mask) / _count(mask)


def _mean_sqrt_len(states: Tensor, mask: Tensor) -> Tensor:
    return _sum(states, mask) / _count(mask).sqrt()


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Later tokens count more: the weight of a token is its position, from 1."""
    weights = torch.arange(1, states.shape[1] + 1, device=states.device) * mask
    return _sum(states * weights[..., None], mask) / weights.sum(1, keepdim=True).clamp(min=1)


def _max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(~mask[..., None], -torch.inf).amax(1)


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), mask.int().argmax(1)]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    width = mask.shape[1]
    return states[torch.arange(len(states), device=states.device), width - 1 - mask.flip(1).int().argmax(1)]


POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "last": _last,
    "cls": _first,
    "max": _max,
    "weighted_mean": _weighted_mean,
    "mean_sqrt_len": _mean_sqrt_len,
}
