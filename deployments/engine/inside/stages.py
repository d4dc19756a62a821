"""What one forward copies: a tensor for each tap, of all sequences that take the same tokens of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deployments.engine.inside.inspected import Inspected
from deployments.engine.inside.layout import Source
from deployments.engine.inside.recording import Recording


@dataclass(slots=True, eq=False)
class Span:
    """The new tokens of an inspected sequence in a forward: `count` from position `start`, at a row of the batch."""

    row: int
    inspected: Inspected
    start: int
    count: int


@dataclass(slots=True, eq=False)
class Rows:
    """Rows of a batch of `count`."""

    numbers: list[int]
    count: int
    all: bool = field(init=False)
    _index: Tensor | None = None

    def __post_init__(self) -> None:
        self.all = self.numbers == list(range(self.count))

    def of(self, states: Tensor) -> Tensor:
        """A copy of these rows."""
        return states.clone() if self.all else states.index_select(0, self.index(states))

    def index(self, states: Tensor) -> Tensor:
        """The numbers as an index of states."""
        if self._index is None:
            self._index = as_index(self.numbers, states)
        return self._index


@dataclass(slots=True, eq=False)
class Stage:
    """What one forward copies for recordings that take the same tokens of the same taps.

    Attributes:
        takers: the recordings with their spans, in the order of the first axis of each tensor.
        columns: tokens, counted from the last one, which is -1.
        tensors: [takers, columns, ...]
    """

    takers: Sequence[tuple[Span, Recording]]
    rows: Rows
    columns: Sequence[int] = ()
    tensors: dict[Source, Tensor] = field(default_factory=dict)

    def take(self, source: Source, states: Tensor) -> None:
        """Copy what is captured of states [rows, tokens, ...]."""
        width = states.shape[1]
        if isinstance(self.columns, range):
            taken = states[:, max(0, width + self.columns.start) : width + self.columns.stop]
        else:
            columns = [width + column for column in self.columns if column >= -width]
            taken = states.index_select(1, as_index(columns, states))
        self.tensors[source] = self.rows.of(taken)


@dataclass(slots=True, eq=False)
class Takers:
    """Recordings that capture the same taps: the number of the span of each, and its place in `Inspected.recordings`.

    It outlives the recordings, so it does not hold them.
    """

    each: Sequence[tuple[int, int]]
    _rows: Rows | None = None

    def stages(self, spans: Sequence[Span], count: int) -> list[Stage]:
        """The stages of a forward of `count` sequences."""
        found: dict[Sequence[int], list[tuple[Span, Recording]]] = {}
        for span, recording in self.of(spans):
            if columns := _columns(recording, span):
                found.setdefault(columns, []).append((span, recording))
        return [
            Stage(takers, self._rows_of([span.row for span, _ in takers], count), columns)
            for columns, takers in found.items()
        ]

    def of(self, spans: Sequence[Span]) -> list[tuple[Span, Recording]]:
        """The recordings, each with its span."""
        return [(spans[number], spans[number].inspected.recordings[place]) for number, place in self.each]

    def _rows_of(self, numbers: list[int], count: int) -> Rows:
        """The rows of the last forward if they are the same: they have an index already."""
        if self._rows is None or (self._rows.numbers, self._rows.count) != (numbers, count):
            self._rows = Rows(numbers, count)
        return self._rows


def _columns(recording: Recording, span: Span) -> Sequence[int]:
    end = span.start + span.count
    positions = recording.chosen.within(span.start, span.count)
    if isinstance(positions, range):
        return range(positions.start - end, positions.stop - end)
    return tuple(position - end for position in positions)


def places(positions: Sequence[int], first: int, states: Tensor) -> slice | Tensor:
    """Where positions are in states that begin with position `first`."""
    if positions[-1] - positions[0] == len(positions) - 1:
        return slice(positions[0] - first, positions[-1] - first + 1)
    return as_index([position - first for position in positions], states)


def as_index(numbers: Sequence[int], states: Tensor) -> Tensor:
    """An index for which nothing waits on a GPU, as it would for a list."""
    return torch.tensor(numbers).to(states.device, non_blocking=True)
