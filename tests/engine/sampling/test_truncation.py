from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from deployments.core.calls import SamplingParams
from deployments.engine.sampling import truncation
from deployments.engine.sampling.truncation import CANDIDATES, Truncation, draw_untruncated, gumbel, truncate


def kept_tokens(scores: torch.Tensor, params: list[SamplingParams]) -> list[set[int]]:
    settled, kept, unsettled, masked = truncate(scores, Truncation.from_params(params, scores.device))
    assert sorted(settled + unsettled) == list(range(len(params)))
    sets: list[set[int]] = [set() for _ in params]
    for place, row in enumerate(settled):
        sets[row] = set(kept.ids[place][kept.weights[place] > 0].tolist())
    for place, row in enumerate(unsettled):
        sets[row] = set((masked[place] > float("-inf")).nonzero()[:, 0].tolist())
    return sets


def reference(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' warpers in transformers' order, float64 so that its own rounding does not blur the edge."""
    out = scores[None].double()
    ids = torch.zeros(1, 1, dtype=torch.long)
    out = TemperatureLogitsWarper(params.temperature)(ids, out)
    if params.top_k:
        out = TopKLogitsWarper(params.top_k)(ids, out)
    if params.top_p < 1:
        out = TopPLogitsWarper(params.top_p)(ids, out)
    if params.min_p:
        out = MinPLogitsWarper(params.min_p)(ids, out)
    if params.typical_p < 1:
        out = TypicalLogitsWarper(params.typical_p)(ids, out)
    return out[0]


SETTINGS = [
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=700),
    SamplingParams(top_k=100_000),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.05),
    SamplingParams(top_p=0.999),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=0.1),
    SamplingParams(min_p=0.0001),
    SamplingParams(min_p=1.0),
    SamplingParams(typical_p=0.9),
    SamplingParams(typical_p=0.2),
    SamplingParams(top_k=40, top_p=0.7),
    SamplingParams(top_k=600, top_p=0.95, min_p=0.001),
    SamplingParams(top_p=0.9, min_p=0.02, temperature=0.6),
    SamplingParams(top_k=50, top_p=0.8, typical_p=0.9, temperature=1.7),
    SamplingParams(temperature=0.01, top_p=0.5),
    SamplingParams(temperature=30.0, top_p=0.5),
]


@pytest.mark.parametrize("vocab", [11, CANDIDATES, 1500])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_kept_sets_are_those_of_transformers(vocab: int, spread: float) -> None:
    settings = [s for s in SETTINGS if s.top_k <= vocab]
    for seed in range(5):
        scores = torch.randn(len(settings), vocab, generator=torch.Generator().manual_seed(seed)) * spread
        for row, (params, kept) in enumerate(zip(settings, kept_tokens(scores, settings), strict=True)):
            expected = set((reference(scores[row], params) > float("-inf")).nonzero()[:, 0].tolist())
            assert kept == expected, params


def test_ties_with_the_kth_logit_are_kept() -> None:
    scores = torch.zeros(1, 2000)
    assert len(kept_tokens(scores, [SamplingParams(top_k=5)])[0]) == 2000


def test_masked_tokens_stay_out() -> None:
    scores = torch.full((3, 1000), float("-inf"))
    scores[:, 17] = 1.0
    settings = [SamplingParams(top_p=0.9), SamplingParams(top_k=50), SamplingParams(typical_p=0.5)]
    assert kept_tokens(scores, settings) == [{17}, {17}, {17}]


def test_a_sequence_is_cut_the_same_whatever_its_neighbors() -> None:
    scores = torch.randn(len(SETTINGS), 1500, generator=torch.Generator().manual_seed(9))
    together = kept_tokens(scores, SETTINGS)
    alone = [kept_tokens(scores[i : i + 1], [params])[0] for i, params in enumerate(SETTINGS)]
    assert together == alone


def keys(count: int) -> torch.Tensor:
    return torch.randint(0, 2**62, (count,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("vocab", [5, 256, 257, 3000])
def test_untruncated_draws_follow_the_distribution(vocab: int) -> None:
    scores = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab))
    count = 40_000
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = torch.cat(
        [
            draw_untruncated(scores.expand(1000, -1), torch.full((1000,), 0.8), u, k)
            for u, k in zip(uniform.split(1000), keys(count).split(1000), strict=True)
        ]
    )
    expected = (scores[0].double() / 0.8).softmax(-1) * count
    order = expected.argsort(descending=True)
    # Tokens in groups of similar expected counts, so that every group is large enough for a chi-square.
    groups = (expected[order].cumsum(0) / count * 20).long().clamp(max=19)
    found = torch.bincount(drawn, minlength=vocab)[order].double()
    want, got = (torch.zeros(20, dtype=torch.float64).index_add_(0, groups, x) for x in (expected[order], found))
    used = want > 0
    chi_square = ((got - want) ** 2 / want.clamp(min=1e-9))[used].sum()
    assert chi_square < 60


@pytest.mark.parametrize("size", [1e-6, 1e-4])
def test_rounding_in_the_logits_rarely_changes_a_token(size: float) -> None:
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(4000, 261, generator=generator)
    rounded = scores + torch.randn(scores.shape, generator=generator) * size
    uniform = torch.rand(4000, dtype=torch.float64, generator=generator)
    first, second = (draw_untruncated(x, torch.ones(4000), uniform, keys(4000)) for x in (scores, rounded))
    assert (first != second).sum() <= 1 + 4000 * size * 3


def test_draws_never_take_a_token_of_probability_zero() -> None:
    scores = torch.full((64, 700), float("-inf"))
    scores[:, 300] = 0.0
    scores[:, 301] = -5.0
    uniform = torch.linspace(0, 1 - 1e-16, 64, dtype=torch.float64)
    assert set(draw_untruncated(scores, torch.ones(64), uniform, keys(64)).tolist()) <= {300, 301}


def test_gumbel_numbers_depend_on_key_and_id_alone() -> None:
    ids = torch.arange(50_000)[None]
    numbers = gumbel(keys(1), ids)[0]
    shuffled = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gumbel(keys(1), ids[:, shuffled])[0], numbers[shuffled])
    assert numbers.isfinite().all()
    assert abs(numbers.mean().item() - 0.5772) < 0.03
    assert abs(numbers.var().item() - 1.6449) < 0.06
    assert abs(torch.corrcoef(torch.stack((numbers, gumbel(keys(2)[1:], ids)[0])))[0, 1].item()) < 0.02


class Operators(TorchDispatchMode):
    """Counts the operators of a computation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


FLAT = [
    SamplingParams(top_p=0.95),
    SamplingParams(typical_p=0.9),
    SamplingParams(typical_p=0.9, top_p=0.99, min_p=1e-4),
]


@pytest.mark.parametrize("params", FLAT)
def test_flat_distributions_take_as_many_operators_however_many_there_are(params: SamplingParams) -> None:
    scores = torch.randn(16, 8000)
    counts = []
    for rows in (2, 16):
        with Operators() as operators:
            truncate(scores[:rows], Truncation.from_params([params] * rows, scores.device))
        counts.append(len(operators.names))
    assert counts[0] == counts[1]
    assert counts[1] < 250


@pytest.mark.parametrize("vocab", [3000, 40_000])
def test_a_gpu_gets_the_tokens_of_a_cpu_and_waits_once(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for tensors that the host cannot read without waiting has no size that depends on values."""
    scores = torch.randn(len(SETTINGS), vocab) * torch.linspace(0.05, 4, len(SETTINGS))[:, None]
    cut, uniform = Truncation.from_params(SETTINGS, scores.device), torch.linspace(0, 0.999, len(SETTINGS)).double()
    kept = kept_tokens(scores, SETTINGS)
    drawn = draw_untruncated(scores, cut.temperature, uniform, keys(len(SETTINGS)))
    monkeypatch.setattr(truncation, "on_host", lambda tensor: False)
    with Operators() as operators:
        truncate(scores, cut)
        assert torch.equal(draw_untruncated(scores, cut.temperature, uniform, keys(len(SETTINGS))), drawn)
    assert not [name for name in operators.names if name.startswith(("nonzero", "_local_scalar", "bincount"))]
    assert kept_tokens(scores, SETTINGS) == kept
