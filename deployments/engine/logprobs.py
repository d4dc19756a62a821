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
    ranks = (logits > chosen).sum(-1) + 1
    count = min(max(tops, default=0), logits.shape[1])
    values, ids = logits.topk(count, dim=-1)
    return _as_scores(
        (chosen[:, 0] - norm).tolist(), ranks.tolist(), ids.tolist(), (values - norm[:, None]).tolist(), tops
    )


def _as_scores(
    logprobs: Sequence[float],
    ranks: Sequence[int],
    ids: Sequence[Sequence[int]],
    values: Sequence[Sequence[float]],
    tops: Sequence[int],
) -> list[TokenScore]:
    scores = []
    for row, top in enumerate(tops):
        kept = sum(value > float("-inf") for value in values[row][:top])
        scores.append(TokenScore(logprobs[row], ranks[row], tuple(ids[row][:kept]), tuple(values[row][:kept])))
    return scores
