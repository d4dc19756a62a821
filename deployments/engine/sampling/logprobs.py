"""Log-probabilities of tokens: the chosen one's, its rank, and the most likely alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's log-probability (natural logarithm) at its position.

    Attributes:
        logprob: of the token.
        rank: 1 for the likeliest token, ties share the better rank.
        top_ids, top_logprobs: the likeliest tokens, best first; tokens of probability 0 are left out.
        every: in place of them, the log-probabilities of all token ids, as float32.
    """

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    every: bytes | None = None


def token_scores(
    logits: torch.Tensor, token_ids: torch.Tensor, tops: Sequence[int], named: Mapping[int, Sequence[int]] | None = None
) -> list[TokenScore]:
    """Scores of one token per sequence under softmax(logits).

    Args:
        logits: [rows, vocab], any float dtype; computed in float32.
        token_ids: int64 [rows].
        tops: how many alternatives each sequence reports; -1 for all tokens.
        named: by sequence, the tokens that it reports in place of the likeliest; ids beyond the logits are left out.
    """
    logits = logits.float()
    chosen = logits.gather(1, token_ids[:, None])
    count = min(max([1, *tops]), logits.shape[1])
    values, ids = logits.topk(count, dim=-1)
    peaks, norm = values[:, :1], _excess(logits, values[:, :1], ids[:, :1])
    best, own = values.tolist(), chosen[:, 0].tolist()
    ranks = [1 + sum(value > mine for value in row) for row, mine in zip(best, own, strict=True)]
    # Only a token that is not among the likeliest has to be compared with all others.
    deep = [row for row, rank in enumerate(ranks) if rank > count]
    if deep:
        for row, above in zip(deep, (logits[deep] > chosen[deep]).sum(-1).tolist(), strict=True):
            ranks[row] = above + 1
    logprobs = (chosen - peaks - norm)[:, 0].tolist()
    alternatives = (values - peaks - norm).tolist()
    scores = [
        TokenScore(logprobs[row], ranks[row], *_finite(found[: max(top, 0)], alternatives[row][: max(top, 0)]))
        for row, (found, top) in enumerate(zip(ids.tolist(), tops, strict=True))
    ]
    for row, top in enumerate(tops):
        if top == -1 and row not in (named or {}):
            every = (logits[row] - peaks[row] - norm[row]).cpu().numpy().tobytes()
            scores[row] = replace(scores[row], every=every)
    for row, wanted in (named or {}).items():
        scores[row] = replace(scores[row], **_named(logits[row] - peaks[row] - norm[row], wanted))
    return scores


def _excess(logits: torch.Tensor, peaks: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """How far logsumexp(logits) is above the peaks, [rows, 1]; as exact near 0 as anywhere.

    logit - logsumexp would round a log-probability near 0 as coarsely as the logits are, and torch's log_softmax on a
    CPU loses what many small terms add to a large one.
    """
    return (logits - peaks).exp_().scatter_(1, best, 0.0).sum(-1, keepdim=True).log1p_()


def _named(logprobs: torch.Tensor, wanted: Sequence[int]) -> dict[str, Any]:
    known = [i for i in wanted if 0 <= i < len(logprobs)]
    found = zip(known, logprobs[known].tolist(), strict=True)
    best_first = sorted(found, key=lambda pair: pair[1], reverse=True)
    top_ids, top_logprobs = _finite([i for i, _ in best_first], [logprob for _, logprob in best_first])
    return {"top_ids": top_ids, "top_logprobs": top_logprobs}


def _finite(ids: Sequence[int], logprobs: Sequence[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The candidates, best first, without those of probability 0."""
    kept = sum(logprob > float("-inf") for logprob in logprobs)
    return tuple(ids[:kept]), tuple(logprobs[:kept])
