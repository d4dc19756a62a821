"""Attention weights, computed beside a model's `sdpa` attention, which does not give them."""

from __future__ import annotations

import torch
from torch import Tensor

from deployments.engine.model.attention import AttentionCall


def attention_weights(call: AttentionCall, row: int, count: int, total: int) -> Tensor:
    """The weights of the last tokens of a sequence.

    Args:
        call: of the attention, for all sequences.
        row: of the sequence.
        count: its new tokens, in the last columns.
        total: its tokens with these.

    Returns:
        float32 [count, heads, total]; key j is token j, and 0 if it is not seen or no longer kept.
    """
    query, key = call.query[row, :, -count:].float(), call.key[row].float()
    groups = query.shape[0] // key.shape[0]
    scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    scores = query @ key.repeat_interleave(groups, dim=0).transpose(-1, -2) * scale
    scores = scores + _hidden(call, row, count)
    weights = scores.softmax(-1).nan_to_num().transpose(0, 1)
    kept = min(total, weights.shape[-1])
    found = weights.new_zeros(count, weights.shape[1], total)
    found[..., total - kept :] = weights[..., weights.shape[-1] - kept :]
    return found


def _hidden(call: AttentionCall, row: int, count: int) -> Tensor:
    """What is added to the scores [heads, count, columns]: minus infinity for keys that are not seen."""
    columns, tokens = call.key.shape[2], call.query.shape[2]
    if call.mask is not None:
        mask = call.mask[min(row, call.mask.shape[0] - 1)][:, -count:, -columns:]
        if mask.dtype is torch.bool:
            return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))
        return mask.float()
    seen = torch.ones(tokens, columns, dtype=torch.bool, device=call.key.device)
    if call.causal and tokens > 1:
        seen = seen.tril(columns - tokens)
    return torch.zeros(count, columns, device=seen.device).masked_fill(~seen[-count:], float("-inf"))
