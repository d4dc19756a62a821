"""Guessing a row's next tokens from its own text: what followed the last time these tokens came.

Agents repeat themselves: action names, file names, the phrases of their protocol. A forward over a row's last token and
a few guesses costs little more than one over the last token alone, as long as rows are few. Every position is sampled
as ever, so no text depends on the guesses; those that sampling confirms are steps saved
(https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from deployments.engine.batching.sequence import Batch, Row
from deployments.engine.cache.cache import RowsCache, new_cache
from deployments.engine.cache.layers import KeyValueRows
from deployments.engine.model.forward import NO_OFFSET, Forward
from deployments.engine.speedups.draft import Guesser

logger = logging.getLogger(__name__)

MOST_ROWS = 4
"""Rows up to which a forward over several tokens each is cheap."""


class PromptLookup:
    """Guesses for the rows of a batch.

    Args:
        forward: the model's forward passes; its layers must all have full attention.
        most: tokens guessed at a time.

    Attributes:
        confirmed: guesses that sampling has confirmed.
    """

    def __init__(self, forward: Forward, most: int) -> None:
        self._forward = forward
        self._most = most
        self.confirmed = 0

    def guesses(self, batch: Batch) -> list[list[int]] | None:
        """Equally many tokens for every row; None where a plain step is better."""
        rows = batch.rows
        if len(rows) > MOST_ROWS or not isinstance(batch.cache, RowsCache):
            return None
        if any(row.alone or row.offset != NO_OFFSET for row in rows):
            return None
        most = min(self._most, *(self._room(row) for row in rows))
        found = [self._guess(row, most) if most > 0 else [] for row in rows]
        longest = max(map(len, found))
        if 2 * sum(map(bool, found)) <= len(rows) - 1 or not longest:
            return None
        return [[*guess, *row.ids[-1:] * (longest - len(guess))] for guess, row in zip(found, rows, strict=True)]

    def forward(self, batch: Batch, guesses: Sequence[Sequence[int]]) -> Tensor:
        """Logits [rows, 1 + guesses, vocab]; the cache has all of these tokens then."""
        tokens = [[row.ids[-1], *guess] for row, guess in zip(batch.rows, guesses, strict=True)]
        return self._forward.prefill(tokens, batch.cache, all_logits=True, wholes=[0] * len(tokens)).logits

    def settle(self, batch: Batch, guesses: Sequence[Sequence[int]], right: Sequence[int]) -> None:
        """Take back what was guessed wrong; `right` is how many of each row's guesses were not."""
        for row, count in zip(batch.rows, right, strict=True):
            self.confirmed += count
            if row.guesser is not None:
                row.guesser.learn(count, len(row.ids))
        assert isinstance(batch.cache, RowsCache)
        batch.cache.trim([len(guess) - count for guess, count in zip(guesses, right, strict=True)])

    def _room(self, row: Row) -> int:
        """Tokens that may be guessed after a row's last one."""
        left = row.final_length - len(row.ids) - 1
        room = self._forward.rotary.room(len(row.ids))
        return left if room is None else min(left, room)

    @staticmethod
    def _guess(row: Row, most: int) -> list[int]:
        if row.guesser is None:
            row.guesser = Guesser()
        return row.guesser.guess(row.ids, most)


def prompt_lookup(forward: Forward, most: int, *, chunks: bool, deterministic: bool) -> PromptLookup | None:
    """Guesses of at most so many tokens, or None, with a warning where they were asked for in vain.

    Args:
        chunks: the model computes several tokens over a cache as it should.
        deterministic: the mode in which a token's bits are those of a plain decode step.
    """
    if most <= 0:
        return None
    cache = new_cache(forward.model)
    croppable = isinstance(cache, RowsCache) and all(
        type(layer) is KeyValueRows and not layer.is_sliding for layer in cache.layers
    )
    if croppable and chunks and not deterministic:
        return PromptLookup(forward, most)
    reason = "deterministic mode decodes token by token" if deterministic else "its cache cannot be cut back"
    logger.warning("Engine option prompt_lookup=%d has no effect on this model: %s.", most, reason)
    return None
