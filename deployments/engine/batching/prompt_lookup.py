"""Draft tokens from a sequence's own text: what followed the last time these tokens came.

Agents repeat themselves: action names, file names, the phrases of their protocol. A forward over a sequence's last
token and a few draft tokens costs little more than one over the last token alone, as long as few sequences run. Every
position is sampled as ever, so no text depends on the drafts; each that sampling confirms saves a step
(https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

import logging
from collections import abc

from torch import Tensor

from deployments.engine.batching.sequence import Batch, Sequence
from deployments.engine.cache.cache import BatchCache, keeps_all_columns, new_cache
from deployments.engine.model.forward import NO_OFFSET, Forward
from deployments.engine.speedups.draft import Drafter

logger = logging.getLogger(__name__)

MOST_SEQUENCES = 4
"""Sequences up to which a forward over several tokens each is cheap."""


class PromptLookup:
    """Draft tokens for the sequences of a batch.

    Args:
        forward: the model's forward passes; its layers must all have full attention.
        most: tokens drafted at a time.
    """

    def __init__(self, forward: Forward, most: int) -> None:
        self._forward = forward
        self._most = most

    def draft_tokens(self, batch: Batch) -> list[list[int]] | None:
        """Equally many tokens for every sequence; None if a plain step is better."""
        sequences = batch.sequences
        if len(sequences) > MOST_SEQUENCES or not isinstance(batch.cache, BatchCache):
            return None
        if any(s.isolated or s.inspected is not None or s.offset != NO_OFFSET for s in sequences):
            return None
        most = min(self._most, *(self._room(sequence) for sequence in sequences))
        found = [self._draft(sequence, most) if most > 0 else [] for sequence in sequences]
        longest = max(map(len, found))
        if 2 * sum(map(bool, found)) <= len(sequences) - 1 or not longest:
            return None
        return [
            [*drafts, *sequence.ids[-1:] * (longest - len(drafts))]
            for drafts, sequence in zip(found, sequences, strict=True)
        ]

    def forward(self, batch: Batch, draft_tokens: abc.Sequence[abc.Sequence[int]]) -> Tensor:
        """Logits [sequences, 1 + draft_tokens, vocab]; the cache has all of these tokens then."""
        tokens = [[sequence.ids[-1], *drafts] for sequence, drafts in zip(batch.sequences, draft_tokens, strict=True)]
        return self._forward.prefill(tokens, batch.cache, all_logits=True, wholes=[0] * len(tokens)).logits

    def settle(self, batch: Batch, draft_tokens: abc.Sequence[abc.Sequence[int]], right: abc.Sequence[int]) -> None:
        """Take back draft tokens that were wrong; `right` is how many of each sequence's were not."""
        for sequence, count in zip(batch.sequences, right, strict=True):
            if sequence.drafter is not None:
                sequence.drafter.learn(count, len(sequence.ids))
        assert isinstance(batch.cache, BatchCache)
        batch.cache.trim([len(drafts) - count for drafts, count in zip(draft_tokens, right, strict=True)])

    def _room(self, sequence: Sequence) -> int:
        """Tokens that may be drafted after a sequence's last one."""
        left = sequence.final_length - len(sequence.ids) - 1
        room = self._forward.rotary.room(len(sequence.ids))
        return left if room is None else min(left, room)

    @staticmethod
    def _draft(sequence: Sequence, most: int) -> list[int]:
        if sequence.drafter is None:
            sequence.drafter = Drafter()
        return sequence.drafter.draft(sequence.ids, most)


def prompt_lookup(forward: Forward, most: int, *, chunks: bool, deterministic: bool) -> PromptLookup | None:
    """Drafts of at most `most` tokens, or None, with a warning if the model cannot use drafts.

    Args:
        chunks: the model computes several tokens over a cache as it should.
        deterministic: the mode in which a token's bits are those of a plain decode step.
    """
    if most <= 0:
        return None
    if keeps_all_columns(new_cache(forward.model)) and chunks and not deterministic:
        return PromptLookup(forward, most)
    reason = "deterministic mode decodes token by token" if deterministic else "its cache cannot be cut back"
    logger.warning("Engine option prompt_lookup=%d has no effect on this model: %s.", most, reason)
    return None
