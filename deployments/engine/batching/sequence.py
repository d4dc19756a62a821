"""A request while it is being computed, and the batches that requests decode in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.engine.base.protocol import Emit, EngineRequest
from deployments.engine.cache.cache import AnyRowsCache
from deployments.engine.model.forward import NO_OFFSET, Offset
from deployments.engine.sampling.state import RowSampler
from deployments.engine.speedups.draft import Guesser
from deployments.engine.text.output import ChoiceOutput
from deployments.engine.text.prompt_logprobs import PromptScorer


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One request's state.

    Attributes:
        ids: prompt and generated tokens (the decoder's, for an encoder-decoder model).
        prompt_length: of `ids`, how many are the prompt.
        frequencies: the rotary frequencies of its keys; see `RowRotary.frequencies`.
        media_end: tokens up to here mean nothing without the request's `model_inputs`.
        scorer: scores the prompt's tokens, where asked for.
        encoded_length: tokens its encoder sees.
        offset: from a token's index to its position.
        alone: to be computed by itself, after a forward that it may have broken.
        attempts: forwards of this row that failed since the last decode step that did not.
        order: its place in the queue at arrival.
        guesser: guesses its next tokens, where that was tried.
        ended: its client has had the last event.
        to_go: tokens to be computed of it while it waits, and the version of the prefix store that this follows from.
        awaits: a row being prefilled that will have most of what it lacks.
    """

    request: EngineRequest
    emit: Emit
    sampler: RowSampler
    output: ChoiceOutput
    ids: list[int]
    prompt_length: int
    frequencies: tuple[int, ...] = ()
    media_end: int = 0
    encoded_length: int = 0
    scorer: PromptScorer | None = None
    offset: Offset = NO_OFFSET
    alone: bool = False
    attempts: int = 0
    order: int = 0
    guesser: Guesser | None = None
    ended: bool = False
    to_go: tuple[int, int] | None = None
    awaits: Row | None = None

    @property
    def salt(self) -> tuple[object, ...]:
        """What a row's cache follows from beside its tokens."""
        return (self.request.salt, *self.frequencies)

    @property
    def final_length(self) -> int:
        """Tokens the row may have in the end, the last of which never enters the cache."""
        return self.prompt_length + (self.request.sampling.max_tokens or 1)


@dataclass(slots=True, eq=False)
class Batch:
    """Rows that decode together, in the order of the cache's rows.

    Every row's last token is not in the cache yet: it is the next forward's input.
    """

    cache: AnyRowsCache
    rows: list[Row] = field(default_factory=list)

    def drop(self, row: Row, *, blank: bool = False) -> None:
        """Let a row leave; the last one takes its place."""
        index = self.rows.index(row)
        self.cache.drop(index, blank=blank)
        last = self.rows.pop()
        if last is not row:
            self.rows[index] = last

    def absorb(self, other: Batch) -> None:
        """Let all rows of another batch join."""
        for index in range(len(other.rows)):
            self.cache.append(other.cache, index)
        self.rows.extend(other.rows)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists begin with in common."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
