"""Scores of tokens: what single precision can tell of a distribution."""

from __future__ import annotations

import math

import pytest
import torch

from deployments.engine.sampling.logprobs import token_scores

VOCAB = 128_000


@pytest.mark.parametrize("offset", [-40.0, 0.0, 40.0])
def test_near_certainty_is_as_exact_as_doubt(offset: float) -> None:
    """The rest of a large vocabulary adds up to 1e-4 to 1e-7 beside the likeliest token."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = torch.tensor([22.0, 24.0, 26.0, 28.0])
    logits += offset
    expected = logits.double().log_softmax(-1)
    scores = token_scores(logits, torch.tensor([7, 7, 7, 8]), [2] * 4, named={3: [7]})
    for row, score in enumerate(scores[:3]):
        assert score.logprob == pytest.approx(expected[row, 7].item(), rel=1e-4)
        assert score.top_logprobs == pytest.approx(expected[row].topk(2).values.tolist(), rel=1e-4)
    assert scores[3].logprob == pytest.approx(expected[3, 8].item(), rel=1e-6)
    assert scores[3].top_logprobs == pytest.approx([expected[3, 7].item()], rel=1e-4)


def test_a_certain_token_has_log_probability_zero() -> None:
    (score,) = token_scores(torch.tensor([[-math.inf, 3.0, -math.inf]]), torch.tensor([1]), [3])
    assert (score.logprob, score.rank, score.top_ids, score.top_logprobs) == (0.0, 1, (1,), (0.0,))


def test_equal_peaks_share_the_probability_and_the_rank() -> None:
    scores = token_scores(torch.tensor([[5.0, 5.0, 5.0, 5.0]] * 2), torch.tensor([0, 3]), [0, 0])
    assert [(score.logprob, score.rank) for score in scores] == [(pytest.approx(-math.log(4)), 1)] * 2
