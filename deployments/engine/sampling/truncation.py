"""Truncated distributions: top_k, top_p, min_p, typical_p, in transformers' order and with its kept sets.

Sorting 128k logits per sequence and step would cost more than a small model's forward. The kept sets of top_k, top_p
and min_p are the n most likely tokens, and n is nearly always small: the largest `CANDIDATES` logits are looked at
first. Where the last of them is still kept, and for typical_p, the sequence's cut is found with a histogram of its
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deployments.core.calls import SamplingParams

CANDIDATES = 256
_BLOCK = 256
# Logits that are cut at once on a CPU.
_CELLS = 1 << 17
# Bins of the histogram: an eighth of a nat each, down to e^-64 of the heaviest weight.
_PER_UNIT = 8
_BINS = 512
# Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as signed numbers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_FLOAT = torch.float64
_COLUMNS = {"temperature": torch.float32, "top_k": torch.int64, "top_p": _FLOAT, "min_p": _FLOAT, "typical_p": _FLOAT}


@dataclass(slots=True)
class Truncation:
    """The truncations of several sequences, one value per sequence, on the device of the logits.

    Attributes:
        of_all: whether some sequence's top_p is a share of the whole vocabulary, top_k being off.
        params: the same as plain numbers.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    typical_p: torch.Tensor
    of_all: bool
    params: Sequence[SamplingParams]

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams], device: torch.device) -> Truncation:
        columns = {
            name: torch.tensor([getattr(p, name) for p in params], dtype=dtype).to(device, non_blocking=True)
            for name, dtype in _COLUMNS.items()
        }
        return cls(**columns, of_all=any(p.top_p < 1 and p.top_k <= 0 for p in params), params=params)

    def of_rows(self, rows: Sequence[int]) -> Truncation:
        """Those of some of the sequences."""
        if len(rows) == len(self.params):
            return self
        index = list(rows)
        columns = {name: getattr(self, name)[index] for name in _COLUMNS}
        return Truncation(**columns, of_all=self.of_all, params=[self.params[row] for row in rows])


@dataclass(slots=True)
class Kept:
    """Tokens that can be drawn, the most likely one first.

    Attributes:
        ids: int64 [rows, candidates].
        weights: float64 [rows, candidates], proportional to the probabilities; 0 for a token that is cut off.
    """

    ids: torch.Tensor
    weights: torch.Tensor

    def draw(self, keys: torch.Tensor) -> torch.Tensor:
        """One token id per sequence; `keys` is int64 [rows], see `gumbel`."""
        place = (self.weights.log() + gumbel(keys, self.ids)).argmax(-1, keepdim=True)
        return self.ids.gather(1, place)[:, 0]


def on_host(tensor: torch.Tensor) -> bool:
    """Whether the host reads a tensor without waiting: sizes may depend on its values then."""
    return tensor.device.type == "cpu"


def truncate(scores: torch.Tensor, cut: Truncation) -> tuple[list[int], Kept, list[int], torch.Tensor]:
    """What is left of each sequence's distribution.

    Args:
        scores: float32 [rows, vocab], after penalties and masks; every sequence has a finite maximum.
        cut: the sequences' truncations.

    Returns:
        The sequences settled by the first candidates, with their kept tokens; the other sequences, with their scores,
        which are -inf for tokens that are cut off.
    """
    vocab = scores.shape[1]
    count = min(CANDIDATES, vocab)
    values, ids = scores.topk(count, dim=-1)
    weights = _weights(values, _totals(scores, values[:, :1], cut), cut)
    is_open = cut.typical_p < 1
    if count < vocab:
        is_open |= (weights[:, -1] > 0) | (cut.top_k > count)
    # The one wait for the device.
    found: list[bool] = is_open.tolist()
    settled = [row for row, still in enumerate(found) if not still]
    unsettled = [row for row, still in enumerate(found) if still]
    masked = scores[unsettled]
    # What is computed of a few rows stays in a CPU's cache.
    group = max(4, _CELLS // vocab) if on_host(scores) else len(scores)
    for first in range(0, len(unsettled), group):
        rows = unsettled[first : first + group]
        some = masked[first : first + group]
        some.masked_fill_(~_kept(some, cut.of_rows(rows)), float("-inf"))
    return settled, Kept(ids[settled], weights[settled]), unsettled, masked


def _kept(scores: torch.Tensor, cut: Truncation) -> torch.Tensor:
    """Which of all tokens each sequence keeps; float32 [rows, vocab] to bool [rows, vocab]."""
    exponents = (scores - scores.amax(-1, keepdim=True)).div_(cut.temperature[:, None])
    weights = exponents.exp()
    keep = scores > float("-inf")
    largest = max(p.top_k if p.top_k < scores.shape[1] else 0 for p in cut.params)
    if largest > 0:
        # Ties with the k-th logit are kept, as TopKLogitsWarper keeps them.
        limited = (cut.top_k > 0) & (cut.top_k < scores.shape[1])
        kth = scores.topk(largest).values.gather(1, (cut.top_k - 1).clamp(0, largest - 1)[:, None])
        keep &= (scores >= kth) | ~limited[:, None]
        weights *= keep
    if any(p.top_p < 1 for p in cut.params):
        # The fewest heaviest tokens that hold top_p of the sum.
        reached = _reached(weights.log().neg_(), weights.neg(), weights, cut.top_p)
        keep &= (weights >= -reached) | (cut.top_p >= 1)[:, None]
    if any(p.min_p > 0 for p in cut.params):
        keep &= weights >= cut.min_p.float()[:, None]
    if any(p.typical_p < 1 for p in cut.params):
        weights *= keep
        distance = _distance(exponents.masked_fill_(~keep, 0.0), weights)
        keep &= (distance <= _reached(distance, distance, weights, cut.typical_p)) | (cut.typical_p >= 1)[:, None]
    return keep


def _distance(exponents: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """How far each token's surprise is from the entropy (locally typical sampling, arXiv:2202.00666).

    With p = exp(x) / Z the surprise is log Z - x and the entropy log Z - E[x]: the distance is that of x to its mean.

    Args:
        exponents: float32 [rows, vocab], x; finite.
        weights: float32 [rows, vocab], exp(x), or 0 for a token that is cut off.

    Returns:
        float64 [rows, vocab].
    """
    doubled = exponents.double()
    mass = weights.double()
    total = mass.sum(-1, keepdim=True)
    return doubled.sub_(mass.mul_(doubled).sum(-1, keepdim=True).div_(total)).abs_()


def _reached(nats: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The key at which the weights of a sequence's tokens, added up by rising keys, hold a share of their sum.

    Weights are counted into bins; only the bin in which the share is reached is sorted.

    Args:
        nats: [rows, vocab], what is binned: at least 0, rising with the keys.
        keys: [rows, vocab].
        weights: float32 [rows, vocab].
        share: float64 [rows], at most 1.

    Returns:
        [rows, 1], of the keys' dtype.
    """
    bins = nats.clamp(max=_BINS / _PER_UNIT).mul_(_PER_UNIT).long().clamp_(max=_BINS - 1)
    sums = weights.new_zeros(len(bins), _BINS, dtype=torch.float64)
    sums = sums.scatter_add_(1, bins, weights.double()).cumsum(-1)
    target = sums[:, -1:] * share[:, None]
    place = torch.searchsorted(sums, target)
    inside = bins == place
    before = torch.where(place > 0, sums.gather(1, (place - 1).clamp(min=0)), 0.0)
    counts = inside.sum(-1, keepdim=True)
    ordered, order = _gathered(keys, inside, counts, float("inf")).sort(-1)
    mass = _gathered(weights, inside, counts, 0.0).gather(1, order).double()
    fewer = (mass.cumsum(-1) - mass + before < target).sum(-1, keepdim=True)
    return ordered.gather(1, torch.minimum(fewer.clamp(min=1), counts) - 1)


def _gathered(values: torch.Tensor, inside: torch.Tensor, counts: torch.Tensor, fill: float) -> torch.Tensor:
    """The values of each row that are inside, [rows, at least the largest count], in their order; `fill` is elsewhere.

    On a CPU they are packed, so that little is sorted. A GPU sorts all sooner than the host knows how many there are.
    """
    if not on_host(values):
        return values.masked_fill(~inside, fill)
    row, column = inside.nonzero(as_tuple=True)
    first = counts.cumsum(0) - counts
    packed = values.new_full((len(values), int(counts.max())), fill)
    packed[row, torch.arange(len(row)) - first[row, 0]] = values[row, column]
    return packed


def draw_untruncated(
    scores: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """One token id per sequence from softmax(scores / temperature).

    The likeliest tokens compete by the Gumbel trick, so that rounding in the logits, which differs with the number of
    sequences in a forward, changes a seed's token as rarely as it can; the many others, all in all unlikely, are drawn
    by inversion.

    Args:
        scores: float32 [rows, vocab]; every sequence has a finite maximum.
        temperature: float32 [rows], positive.
        uniform: float64 [rows] in [0, 1): whether a token is among the likeliest, and else which one it is.
        keys: int64 [rows], see `gumbel`.
    """
    vocab = scores.shape[1]
    values, ids = scores.topk(min(CANDIDATES, vocab), dim=-1)
    head = ((values - values[:, :1]) / temperature[:, None]).exp().double()
    drawn = Kept(ids, head).draw(keys)
    if vocab <= CANDIDATES:
        return drawn
    total = ((scores - values[:, :1]) / temperature[:, None]).exp_().sum(-1).double()
    share = head.sum(-1) / total
    in_tail = uniform >= share
    # A GPU computes all rows sooner than the host knows which of them it needs.
    tail = in_tail.nonzero()[:, 0] if on_host(scores) else torch.arange(len(scores), device=scores.device)
    if len(tail):
        rest = scores[tail].scatter_(1, ids[tail], float("-inf"))
        # Rounding may promise a tail where there is no token left.
        empty = rest.amax(-1) == float("-inf")
        rest.masked_fill_(empty[:, None], 0.0)
        left = (uniform[tail] - share[tail]) / (1 - share[tail])
        found = _invert(rest, temperature[tail], left)
        drawn[tail] = torch.where(empty | ~in_tail[tail], drawn[tail], found)
    return drawn


def gumbel(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gumbel-distributed numbers that depend on a sequence's key and a token's id alone, by SplitMix64.

    Args:
        keys: int64 [rows].
        ids: int64 [rows, candidates].

    Returns:
        float64 [rows, candidates].
    """
    x = keys[:, None] + (ids + 1) * _STEP
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    x = x ^ _shifted(x, 31)
    uniform = (_shifted(x, 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _invert(scores: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens by inversion of the distribution function, in two levels of blocks."""
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
    """Sum of exp((score - top) / temperature) over the vocabulary, where a sequence's top_p is of the whole of it."""
    if not cut.of_all:
        return None
    return ((scores - top) / cut.temperature[:, None]).exp_().sum(-1).double()


def _weights(values: torch.Tensor, totals: torch.Tensor | None, cut: Truncation) -> torch.Tensor:
    """Weights of sorted candidates after top_k, top_p and min_p.

    Args:
        values: float32 [rows, candidates], descending.
        totals: float64 [rows], the weight of the whole vocabulary; None if the candidates are all of it, or if
            no sequence needs it.
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
