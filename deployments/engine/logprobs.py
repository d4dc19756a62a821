"""Log-probabilities of tokens: the chosen one's, its rank, and the likeliest alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's log-probability (natural logarithm) at its position.

    Attributes:
        logprob: of the token.
        rank: 1 for the likeliest token, ties share the better rank.
        top_ids, top_logprobs: the likeliest tokens, best first; tokens of probability 0 are left out.
    """

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def token_scores(logits: torch.Tensor, token_ids: torch.Tensor, tops: Sequence[int]) -> list[TokenScore]:
    """Scores of one token per row under softmax(logits).

    Args:
        logits: [rows, vocab], any float dtype; computed in float32.
        token_ids: int64 [rows].
        tops: how many alternatives each row reports.
    """
    logits = logits.float()
    norm = logits.logsumexp(-1)
    chosen = logits.gather(1, token_ids[:, None])
    count = min(max([1, *tops]), logits.shape[1])
    values, ids = logits.topk(count, dim=-1)
    best, own = values.tolist(), chosen[:, 0].tolist()
    ranks = [1 + sum(value > mine for value in row) for row, mine in zip(best, own, strict=True)]
    # Only a token that is not among the likeliest has to be compared with all others.
    deep = [row for row, rank in enumerate(ranks) if rank > count]
    if deep:
        for row, above in zip(deep, (logits[deep] > chosen[deep]).sum(-1).tolist(), strict=True):
            ranks[row] = above + 1
    logprobs = (chosen[:, 0] - norm).tolist()
    alternatives = (values - norm[:, None]).tolist()
    return [
        TokenScore(logprobs[row], ranks[row], *_finite(found[:top], alternatives[row][:top]))
        for row, (found, top) in enumerate(zip(ids.tolist(), tops, strict=True))
    ]


def _finite(ids: Sequence[int], logprobs: Sequence[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The candidates, best first, without those of probability 0."""
    kept = sum(logprob > float("-inf") for logprob in logprobs)
    return tuple(ids[:kept]), tuple(logprobs[:kept])
