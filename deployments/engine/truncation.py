"""Truncated distributions: top_k, top_p, min_p, typical_p, in transformers' order and with its kept sets.

Sorting 128k logits per row and step would cost more than the model's forward. The kept sets of top_k, top_p and min_p
are prefixes of the sorted tokens, and nearly always short: the largest `CANDIDATES` logits are looked at first, and
only a row whose last candidate is still kept is sorted whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deployments.messages import SamplingParams

CANDIDATES = 256
_BLOCK = 256


@dataclass(slots=True)
class Truncation:
    """The truncations of several rows, one value per row, on the device of the logits.

    Attributes:
        of_all: whether some row's top_p is a share of the whole vocabulary, top_k being off.
        any_typical: whether some row has a typical_p.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    typical_p: torch.Tensor
    of_all: bool
    any_typical: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Truncation:
        def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            temperature=column([p.temperature for p in params], torch.float32),
            top_k=column([p.top_k for p in params], torch.int64),
            top_p=column([p.top_p for p in params], torch.float64),
            min_p=column([p.min_p for p in params], torch.float64),
            typical_p=column([p.typical_p for p in params], torch.float64),
            of_all=any(p.top_p < 1 and p.top_k <= 0 for p in params),
            any_typical=any(p.typical_p < 1 for p in params),
        )

    def rows(self, index: torch.Tensor) -> Truncation:
        return Truncation(
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            self.min_p[index],
            self.typical_p[index],
            self.of_all,
            self.any_typical,
        )


@dataclass(slots=True)
class Kept:
    """Tokens that may be drawn, likeliest first.

    Attributes:
        ids: int64 [rows, candidates].
        weights: float64 [rows, candidates], proportional to the probabilities; 0 for a token that is cut off.
    """

    ids: torch.Tensor
    weights: torch.Tensor

    def draw(self, uniform: torch.Tensor) -> torch.Tensor:
        """One token id per row by inversion of the distribution function; `uniform` is float64 [rows] in [0, 1)."""
        sums = self.weights.cumsum(-1)
        place = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)
        last = self.weights.shape[1] - 1 - (self.weights > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
        return self.ids.gather(1, torch.minimum(place, last))[:, 0]


def truncate(scores: torch.Tensor, cut: Truncation) -> list[tuple[list[int], Kept]]:
    """The kept tokens of each row.

    Args:
        scores: float32 [rows, vocab], after penalties and masks; every row has a finite maximum.
        cut: the rows' truncations.

    Returns:
        Groups of rows, as indices into `scores`, with their kept tokens: those settled by the first candidates, and
        those that had to be sorted whole.
    """
    vocab = scores.shape[1]
    count = min(CANDIDATES, vocab)
    values, ids = scores.topk(count, dim=-1)
    weights = _weights(values, _totals(scores, values[:, :1], cut), cut)
    whole = cut.typical_p < 1
    if count < vocab:
        whole |= weights[:, -1] > 0
    else:
        whole &= False
        weights = _typical(weights, cut)
    settled, open_rows = (~whole).nonzero()[:, 0], whole.nonzero()[:, 0]
    groups = []
    if len(settled):
        groups.append((settled.tolist(), Kept(ids[settled], weights[settled])))
    if len(open_rows):
        cut = cut.rows(open_rows)
        values, ids = scores[open_rows].sort(dim=-1, descending=True)
        groups.append((open_rows.tolist(), Kept(ids, _typical(_weights(values, None, cut), cut))))
    return groups


def draw_untruncated(scores: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token id per row from softmax(scores / temperature), by inversion in two levels of blocks.

    Args:
        scores: float32 [rows, vocab]; every row has a finite maximum.
        temperature: float32 [rows], positive.
        uniform: float64 [rows] in [0, 1).
    """
    rows, vocab = scores.shape
    blocks = -(-vocab // _BLOCK)
    weights = scores.new_zeros(rows, blocks * _BLOCK)
    torch.sub(scores, scores.amax(-1, keepdim=True), out=weights[:, :vocab])
    weights[:, :vocab].div_(temperature[:, None]).exp_()
    weights = weights.view(rows, blocks, _BLOCK)
    sums = weights.sum(-1).double().cumsum(-1)
    target = uniform * sums[:, -1]
    block = _first_above(sums, target)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = weights[torch.arange(rows, device=scores.device), block].double().cumsum(-1)
    return block * _BLOCK + _first_above(inside, target - before)


def _first_above(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index whose running sum exceeds the target; the last one with any weight where rounding leaves none."""
    place = torch.searchsorted(sums, target[:, None], right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(place, last)[:, 0]


def _totals(scores: torch.Tensor, top: torch.Tensor, cut: Truncation) -> torch.Tensor | None:
    """Sum of exp((score - top) / temperature) over the vocabulary, where a row's top_p is of the whole of it."""
    if not cut.of_all:
        return None
    return ((scores - top) / cut.temperature[:, None]).exp_().sum(-1).double()


def _weights(values: torch.Tensor, totals: torch.Tensor | None, cut: Truncation) -> torch.Tensor:
    """Weights of sorted candidates after top_k, top_p and min_p.

    Args:
        values: float32 [rows, candidates], descending.
        totals: float64 [rows], the weight of the whole vocabulary; None if the candidates are all of it, or if
            no row needs it.
    """
    weights = ((values - values[:, :1]) / cut.temperature[:, None]).exp().double()
    # Ties with the k-th logit are kept, as TopKLogitsWarper keeps them.
    kth = values.gather(1, (cut.top_k - 1).clamp(0, values.shape[1] - 1)[:, None])
    limited = cut.top_k[:, None] > 0
    keep = ~limited | (values >= kth)
    keep &= values > float("-inf")
    weights = weights * keep
    mass = weights.sum(-1)
    if totals is not None:
        mass = torch.where(limited[:, 0], mass, totals)
    before = weights.cumsum(-1) - weights
    keep &= (before < (cut.top_p * mass)[:, None]) | (cut.top_p[:, None] >= 1)
    keep &= weights >= cut.min_p[:, None]
    keep[:, 0] = True
    return weights * keep


def _typical(weights: torch.Tensor, cut: Truncation) -> torch.Tensor:
    """Weights after typical_p (locally typical sampling, arXiv:2202.00666)."""
    if not cut.any_typical:
        return weights
    p = weights / weights.sum(-1, keepdim=True)
    surprise = -p.log()
    entropy = torch.where(p > 0, p * surprise, 0.0).sum(-1, keepdim=True)
    distance = (surprise - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    reached = (p.gather(1, order).cumsum(-1) < cut.typical_p[:, None]).sum(-1).clamp(max=p.shape[1] - 1)
    keep = distance <= ordered.gather(1, reached[:, None])
    return torch.where(cut.typical_p[:, None] < 1, weights * keep, weights)
