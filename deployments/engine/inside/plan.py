"""The seam between the engine and what requests ask of a model's inside: a plan for each forward.

`Inspecting.forward` surrounds a forward. If no sequence of it is inspected, nothing is done. Else hooks are registered
at the places that its sequences name, and removed afterwards, so that a forward of other requests never meets one. A
hook that another thread's forward meets does nothing. What was captured counts only if the forward succeeds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deployments.core.errors import ModelError, hook_failure
from deployments.engine.inside.catalogue import Tap
from deployments.engine.inside.copies import Copies
from deployments.engine.inside.edits import Edit
from deployments.engine.inside.inspected import Asked, Inspected, Site
from deployments.engine.inside.layout import first_argument, items, replaced, with_argument
from deployments.engine.inside.recording import Piece, Recording
from deployments.engine.inside.weights import attention_weights
from deployments.engine.model.attention import AttentionCall, watched_attention


class Sequence_(Protocol):
    """A sequence, as far as this module knows it."""

    inspected: Inspected | None


@dataclass(slots=True, eq=False)
class Span:
    """The new tokens of an inspected sequence in a forward: `count` from position `start`, at a row of the batch."""

    row: int
    inspected: Inspected
    start: int
    count: int


Taken = tuple[Span, Recording, str, Tap]
"""Whom a captured tensor is for, its name, and the tap."""


@dataclass(slots=True)
class Plan:
    """What is done in one forward.

    Attributes:
        rows: sequences of the forward.
        users: for each place, the spans that ask for something there.
        calls: how often each place was called.
        staged: captured tensors, each with those that it is for and the place of each in it.
    """

    rows: int
    spans: list[Span]
    users: dict[Site, list[tuple[Span, Asked]]]
    calls: dict[Site, int] = field(default_factory=dict)
    staged: list[tuple[Tensor, list[tuple[Taken, int | None]]]] = field(default_factory=list)

    def at(self, site: Site, value: Tensor, item: int, call: int) -> Tensor | None:
        """Change and capture a tensor of a place; the changed one, if it was changed."""
        users = self.users[site]
        changed: Tensor | None = None
        for span, asked in users:
            for edit, tap in asked.edits:
                if edit.item == item and edit.call in (None, call):
                    changed = self._edited(span, edit, tap, value, changed)
        given = value if changed is None else changed
        takes = [
            (span, recording, label, tap)
            for span, asked in users
            for recording, label, tap, wanted in asked.takes
            if tap.item == item and wanted == call
        ]
        self._take(given, takes)
        return changed

    def _edited(self, span: Span, edit: Edit, tap: Tap, value: Tensor, changed: Tensor | None) -> Tensor | None:
        """The tensor with the edit; the bits of other sequences stay."""
        inspected = span.inspected
        inspected.called.add(id(edit))
        view = tap.layout.view(value if changed is None else changed, span.row, self.rows, span.count)
        first = span.start + span.count - view.shape[0] if tap.layout.axis is not None else 0
        positions = edit.chosen.within(first, view.shape[0])
        if not len(positions) or inspected.error is not None:
            return changed
        if changed is None:
            changed = value.clone()
            view = tap.layout.view(changed, span.row, self.rows, span.count)
        places = _places(positions, first, view)
        try:
            view[places] = edit.apply(view[places], positions)
        except Exception as error:
            inspected.error = ModelError(
                f"{hook_failure(repr(edit.asked.name), error, edit.hook)}, at {edit.module!r}."
            )
        return changed

    def _take(self, value: Tensor, takes: Sequence[Taken]) -> None:
        """Copy what is captured of a tensor: all sequences at once in a decode step, else each by itself."""
        steps = [taken for taken in takes if taken[3].layout.axis == 1 and taken[0].count == 1]
        wanted = [taken for taken in steps if self._positions(taken, 1)]
        if len(wanted) > 1:
            rows = [span.row for span, *_ in wanted]
            every = rows == list(range(self.rows))
            states = value[:, -1].clone() if every else value[:, -1].index_select(0, _index(rows, value))
            self.staged.append((states, [(taken, place) for place, taken in enumerate(wanted)]))
            takes = [taken for taken in takes if taken not in steps]
        for taken in takes:
            self._take_alone(value, taken)

    def _take_alone(self, value: Tensor, taken: Taken) -> None:
        span, _, _, tap = taken
        view = tap.layout.view(value, span.row, self.rows, span.count)
        if tap.layout.axis is None:
            self.staged.append((view.clone(), [(taken, None)]))
            return
        first = span.start + span.count - view.shape[0]
        positions = self._positions(taken, view.shape[0])
        if positions:
            self.staged.append((view[_places(positions, first, view)].clone(), [(taken, None)]))

    @staticmethod
    def _positions(taken: Taken, count: int) -> Sequence[int]:
        """The positions to capture among the last `count` of a span."""
        span, recording, _, _ = taken
        return recording.chosen.within(span.start + span.count - count, count)

    def attended(self, call: AttentionCall) -> None:
        """Capture attention weights."""
        for span, asked in self.users.get((call.module, "attention"), ()):
            for recording, label, tap, _ in asked.takes:
                taken = (span, recording, label, tap)
                positions = self._positions(taken, span.count)
                if positions:
                    weights = attention_weights(call, span.row, span.count, span.start + span.count)
                    self.staged.append((weights[_places(positions, span.start, weights)], [(taken, None)]))

    def commit(self, copies: Copies) -> None:
        """Give the recordings what the forward has captured."""
        pieces: dict[tuple[int, int], dict[str, Piece]] = {}
        copied = copies.of([tensor for tensor, _ in self.staged])
        for copy, (_, takers) in zip(copied, self.staged, strict=True):
            for (span, recording, label, _), place in takers:
                pieces.setdefault((id(span), id(recording)), {})[label] = (copy, place)
        for span in self.spans:
            for recording in span.inspected.recordings:
                found = pieces.get((id(span), id(recording)), {})
                recording.commit(span.start, recording.chosen.within(span.start, span.count), found)


def _places(positions: Sequence[int], first: int, value: Tensor) -> slice | Tensor:
    """Where positions are in states that begin with position `first`."""
    if positions[-1] - positions[0] == len(positions) - 1:
        return slice(positions[0] - first, positions[-1] - first + 1)
    return _index([position - first for position in positions], value)


def _index(rows: Sequence[int], value: Tensor) -> Tensor:
    """An index for which nothing waits on a GPU, as it would for a list."""
    return torch.tensor(rows).to(value.device, non_blocking=True)


_local = threading.local()


class Inspecting:
    """Surrounds the forwards of one model."""

    def __init__(self) -> None:
        self._copies = Copies()

    @contextmanager
    def forward(
        self, sequences: Sequence[Sequence_], starts: Sequence[int], counts: Sequence[int] | int
    ) -> Iterator[None]:
        """A context for one forward.

        Args:
            sequences: in the order of the rows.
            starts: tokens of each that are in the cache already.
            counts: new tokens of each, or of every one.
        """
        spans = [
            Span(row, sequence.inspected, starts[row], counts if isinstance(counts, int) else counts[row])
            for row, sequence in enumerate(sequences)
            if sequence.inspected is not None
        ]
        if not spans:
            yield
            return
        plan = Plan(len(sequences), spans, _users(spans))
        with ExitStack() as stack:
            for site in plan.users:
                stack.enter_context(_hooked(site))
            if any(side == "attention" for _, side in plan.users):
                stack.enter_context(watched_attention(plan.attended))
            _local.plan = plan
            try:
                yield
            finally:
                _local.plan = None
        plan.commit(self._copies)


def _users(spans: Sequence[Span]) -> dict[Site, list[tuple[Span, Asked]]]:
    users: dict[Site, list[tuple[Span, Asked]]] = {}
    for span in spans:
        for site, asked in span.inspected.sites.items():
            users.setdefault(site, []).append((span, asked))
    return users


def _hooked(site: Site) -> Any:
    """The hook of a place, registered until its context ends; attention has none."""
    module, side = site
    if side == "output":
        return module.register_forward_hook(_after(site))
    if side == "input":
        return module.register_forward_pre_hook(_before(site), with_kwargs=True)
    return ExitStack()


def _after(site: Site) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        plan: Plan | None = getattr(_local, "plan", None)
        if plan is None:
            return None
        call = plan.calls[site] = plan.calls.get(site, -1) + 1
        result = output
        for item, value in enumerate(items(output)):
            if value is not None and (changed := plan.at(site, value, item, call)) is not None:
                result = replaced(result, item, changed)
        return result

    return hook


def _before(site: Site) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        plan: Plan | None = getattr(_local, "plan", None)
        found = first_argument(args, kwargs or {})
        if plan is None or found is None:
            return None
        call = plan.calls[site] = plan.calls.get(site, -1) + 1
        changed = plan.at(site, found[1], 0, call)
        return None if changed is None else with_argument(args, kwargs or {}, found[0], changed)

    return hook
