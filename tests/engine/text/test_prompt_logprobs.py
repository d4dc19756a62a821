from __future__ import annotations

import pytest
import torch

from deployments.engine.text import prompt_logprobs as scoring
from deployments.engine.text.prompt_logprobs import PromptScorer, score_positions
from tests.engine.text.test_vocabulary import BYTES

IDS = list(b"hello world")


def logits(positions: int = len(IDS), vocab: int = 261) -> torch.Tensor:
    return torch.randn(positions, vocab, generator=torch.Generator().manual_seed(1)) * 4


@pytest.mark.parametrize("chunk", [1, 3, 11])
def test_chunks_of_any_size_give_the_log_softmax(chunk: int) -> None:
    scorer = PromptScorer(BYTES, IDS, 3)
    whole = logits()
    assert not scorer.complete
    for start in range(0, len(IDS), chunk):
        scorer.feed(whole[start : start + chunk], start)
    assert scorer.complete
    scores = scorer.scores().scores
    expected = whole.log_softmax(-1)
    assert scores[0] is None
    assert len(scores) == len(IDS)
    for position, entry in list(enumerate(scores))[1:]:
        row = expected[position - 1]
        assert entry is not None
        assert entry.token_id == IDS[position]
        assert entry.bytes == BYTES.token_bytes(IDS[position])
        assert entry.logprob == pytest.approx(row[IDS[position]].item(), abs=1e-5)
        assert entry.rank == 1 + (row > row[IDS[position]]).sum().item()
        assert [c.token_id for c in entry.top] == row.topk(3).indices.tolist()
        assert [c.logprob for c in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)


def test_without_alternatives() -> None:
    scorer = PromptScorer(BYTES, IDS, 0)
    scorer.feed(logits(), 0)
    entry = scorer.scores().scores[3]
    assert entry is not None
    assert entry.top == ()


def test_a_prompt_of_one_token_has_no_scores() -> None:
    scorer = PromptScorer(BYTES, [5], 2)
    scorer.feed(logits(1), 0)
    assert scorer.complete
    assert scorer.scores().scores == (None,)


def test_named_tokens_in_place_of_the_likeliest() -> None:
    scorer = PromptScorer(BYTES, IDS, 0, (7, 8))
    scorer.feed(logits(), 0)
    expected = logits().log_softmax(-1)
    for position, score in enumerate(scorer.scores().scores[1:]):
        assert score is not None
        found = {candidate.token_id: candidate.logprob for candidate in score.top}
        assert found == pytest.approx({i: expected[position, i].item() for i in (7, 8)}, abs=1e-5)


def test_half_precision_is_scored_in_float32() -> None:
    half = logits().bfloat16()
    targets = torch.tensor(IDS)
    expected = half.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = [score.logprob for score in score_positions(half, targets, 0)]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_no_more_than_a_few_positions_are_in_float32_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = scoring.token_scores

    def noted(piece: torch.Tensor, *args: object) -> object:
        seen.append(piece.numel())
        return real(piece, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "FLOATS_AT_ONCE", 1000)
    monkeypatch.setattr(scoring, "token_scores", noted)
    targets = torch.tensor(IDS)
    scored = score_positions(logits(), targets, 2)
    assert max(seen) <= 1000
    monkeypatch.setattr(scoring, "FLOATS_AT_ONCE", 1 << 23)
    assert scored == score_positions(logits(), targets, 2)
