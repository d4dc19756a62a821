"""Log-probabilities of a prompt's own tokens, from the logits of its prefill, chunk by chunk.

The log-softmax is taken in float32 over a bounded number of positions at a time, so that a long prompt never needs
[positions, vocab] floats at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deployments.core.events import PromptScores
from deployments.core.logprobs import TokenLogprob
from deployments.engine.sampling.logprobs import TokenScore, token_scores
from deployments.engine.text.vocabulary import Vocabulary

FLOATS_AT_ONCE = 1 << 23


class PromptScorer:
    """Collects the scores of one prompt while it is prefilled.

    Args:
        vocabulary: of the model.
        prompt_ids: the prompt; its first token has no score.
        top: how many alternatives to report per token.
        named: tokens to report beside each one, in place of the likeliest.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int], top: int, named: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._ids = list(prompt_ids)
        self._top = top
        self._named = named
        self._scores: dict[int, TokenLogprob] = {}

    def feed(self, logits: torch.Tensor, start: int) -> None:
        """Score the tokens that follow some positions.

        Args:
            logits: [positions, vocab], any float dtype, of the prompt's positions `start`, `start` + 1, ...; those of
                the last prompt token, which belong to the first generated one, are left out.
            start: the first position.
        """
        following = self._ids[start + 1 : start + 1 + logits.shape[0]]
        targets = torch.tensor(following, dtype=torch.long, device=logits.device)
        for place, score in enumerate(score_positions(logits[: len(following)], targets, self._top, self._named)):
            position = start + 1 + place
            self._scores[position] = self._vocabulary.scored(self._ids[position], score)

    @property
    def complete(self) -> bool:
        """Whether every token but the first has its score."""
        return len(self._scores) == len(self._ids) - 1

    def scores(self) -> PromptScores:
        """The scores in order; None for the first token and for positions that were never fed."""
        return PromptScores(scores=tuple(self._scores.get(i) for i in range(len(self._ids))))


def score_positions(
    logits: torch.Tensor, targets: torch.Tensor, top: int, named: Sequence[int] = ()
) -> list[TokenScore]:
    """Scores of one target per position, in bounded memory.

    Args:
        logits: [positions, vocab], any float dtype.
        targets: int64 [positions].
        top: how many alternatives to report per position.
        named: tokens to report at each position, in place of the likeliest.
    """
    if not len(targets):
        return []
    step = max(1, FLOATS_AT_ONCE // logits.shape[1])
    pieces = zip(torch.split(logits, step), torch.split(targets, step), strict=True)
    return [
        score
        for piece, ids in pieces
        for score in token_scores(piece, ids, [top] * len(ids), {row: named for row in range(len(ids)) if named})
    ]
