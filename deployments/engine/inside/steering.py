"""The edits at one place, of the sequences of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.core.errors import ModelError, hook_failure
from deployments.engine.inside.catalogue import Tap
from deployments.engine.inside.edits import Edit
from deployments.engine.inside.stages import Rows, Span, places

Use = tuple[int, Edit, Tap]
"""The number of a span, what it asks for, and the tap that is changed."""


@dataclass(slots=True, eq=False)
class Steering:
    """Changes the tensors of one place; those of others keep their bits.

    Attributes:
        uses: in the order of the spans, and of the edits of each.
    """

    uses: Sequence[Use]
    _sum: _Sum | None = None

    def changed(self, value: Tensor, item: int, call: int, spans: Sequence[Span], count: int) -> Tensor | None:
        """The changed tensor of a forward of `count` sequences; None if nothing is changed."""
        uses = [use for use in self.uses if use[1].item == item and use[1].call in (None, call)]
        for number, edit, _ in uses:
            spans[number].inspected.called.add(id(edit))
        sums = [use for use in uses if _is_sum(use, spans[use[0]])]
        if len(sums) == len(uses) and len({number for number, *_ in uses}) == len(uses):
            return self._summed(value, sums, spans, count)
        changed = None
        for number, edit, tap in uses:
            changed = _edited(value, changed, spans[number], edit, tap, count)
        return changed

    def _summed(self, value: Tensor, uses: Sequence[Use], spans: Sequence[Span], count: int) -> Tensor | None:
        """One addition for all sequences, each of which has its own vector added to its only new token."""
        chosen = [use for use in uses if use[1].chosen.within(spans[use[0]].start, 1)]
        if not chosen:
            return None
        key = [(spans[number].row, edit) for number, edit, _ in chosen]
        if self._sum is None or not self._sum.fits(key, value):
            self._sum = _Sum(key, value, count)
        return self._sum.of(value)


class _Sum:
    """Adds vectors to rows of a tensor [rows, 1, ..., width], out of place."""

    def __init__(self, key: Sequence[tuple[int, Edit]], value: Tensor, count: int) -> None:
        self._key, self._shape, self._dtype = key, value.shape, value.dtype
        self._rows = Rows([row for row, _ in key], count)
        self._vectors = torch.stack([edit.added(value.dtype).expand(value.shape[1:]) for _, edit in key])

    def fits(self, key: Sequence[tuple[int, Edit]], value: Tensor) -> bool:
        same = all(one is other for (_, one), (_, other) in zip(key, self._key, strict=False))
        rows = [row for row, _ in key] == self._rows.numbers
        return same and rows and (value.shape, value.dtype) == (self._shape, self._dtype)

    def of(self, value: Tensor) -> Tensor:
        if self._rows.all:
            return value + self._vectors
        return value.index_add(0, self._rows.index(value), self._vectors)


def _is_sum(use: Use, span: Span) -> bool:
    return use[1].is_sum and use[2].layout.axis == 1 and span.count == 1


def _edited(value: Tensor, changed: Tensor | None, span: Span, edit: Edit, tap: Tap, count: int) -> Tensor | None:
    """The tensor with one edit."""
    inspected = span.inspected
    view = tap.layout.view(value if changed is None else changed, span.row, count, span.count)
    first = span.start + span.count - view.shape[0] if tap.layout.axis is not None else 0
    positions = edit.chosen.within(first, view.shape[0])
    if not len(positions) or inspected.error is not None:
        return changed
    if changed is None:
        changed = value.clone()
        view = tap.layout.view(changed, span.row, count, span.count)
    where = places(positions, first, view)
    try:
        view[where] = edit.apply(view[where], positions)
    except Exception as error:
        inspected.error = ModelError(f"{hook_failure(repr(edit.asked.name), error, edit.hook)}, at {edit.module!r}.")
    return changed
