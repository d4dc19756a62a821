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
from weakref import ref

from torch import Tensor, nn

from deployments.engine.inside.catalogue import Tap
from deployments.engine.inside.copies import Copies
from deployments.engine.inside.inspected import Inspected
from deployments.engine.inside.layout import Site, Source, first_argument, items, replaced, with_argument
from deployments.engine.inside.recording import Piece, Recording
from deployments.engine.inside.stages import Span, Stage, Takers, places
from deployments.engine.inside.steering import Steering, Use
from deployments.engine.model.attention import AttentionCall, watched_attention
from deployments.engine.model.attention_weights import attention_weights


class Sequence_(Protocol):
    """A sequence, as far as this module knows it."""

    inspected: Inspected | None


class Batch:
    """What is done in the forwards of the same sequences at the same rows: worked out once for all of them.

    Attributes:
        steering: the edits at each place.
        reads: what is captured at each place, each with those that take it.
    """

    def __init__(self, inspected: Sequence[tuple[int, Inspected]], count: int) -> None:
        # Sequences that have ended, and what was captured of them, are not kept by this.
        self._of = [(row, ref(each)) for row, each in inspected], count
        uses: dict[Site, list[Use]] = {}
        takers: dict[tuple[Site, Tap, int], dict[tuple[int, int], None]] = {}
        for number, (_, each) in enumerate(inspected):
            for site, asked in each.sites.items():
                uses.setdefault(site, []).extend((number, edit, tap) for edit, tap in asked.edits)
                for recording, wanted in asked.takes:
                    place = next(i for i, known in enumerate(each.recordings) if known is recording)
                    takers.setdefault((site, wanted.tap, wanted.call), {})[number, place] = None
        self.steering = {site: Steering(each) for site, each in uses.items()}
        self.reads: dict[Site, list[Read]] = {site: [] for site in uses}
        groups: dict[tuple[tuple[int, int], ...], Takers] = {}
        for (site, tap, call), found in takers.items():
            key = tuple(found)
            self.reads[site].append(Read(tap, call, groups.setdefault(key, Takers(key))))

    def is_of(self, inspected: Sequence[tuple[int, Inspected]], count: int) -> bool:
        """Whether it is that of these sequences, at their rows of a forward of `count`."""
        known, rows = self._of
        same = rows == count and len(known) == len(inspected)
        return same and all(a == b and one() is other for (a, one), (b, other) in zip(known, inspected, strict=True))


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor that is captured: its tap, which of several calls, and who takes it."""

    tap: Tap
    call: int
    takers: Takers


@dataclass(frozen=True, slots=True)
class Own:
    """A tensor [1, ...] that is captured of one sequence by itself; `whole` if it has no positions."""

    recording: Recording
    source: Source
    tensor: Tensor
    whole: bool = False


@dataclass(slots=True)
class Plan:
    """What is done in one forward.

    Attributes:
        count: sequences of the forward.
        calls: how often each place was called.
        stages: what those that take the same taps have captured.
        own: what belongs to one sequence by itself.
    """

    batch: Batch
    spans: list[Span]
    count: int
    calls: dict[Site, int] = field(default_factory=dict)
    stages: dict[int, list[Stage]] = field(default_factory=dict)
    own: list[Own] = field(default_factory=list)

    def at(self, site: Site, value: Tensor, item: int, call: int) -> Tensor | None:
        """Change and capture a tensor of a place; the changed one, if it was changed."""
        changed = self.batch.steering[site].changed(value, item, call, self.spans, self.count)
        given = value if changed is None else changed
        for read in self.batch.reads[site]:
            if (read.tap.item, read.call) == (item, call):
                self._take((*site, item, call), given, read)
        return changed

    def _take(self, source: Source, value: Tensor, read: Read) -> None:
        if read.tap.layout.axis is None:
            copy = value.clone()[None]
            self.own.extend(Own(recording, source, copy, whole=True) for _, recording in read.takers.of(self.spans))
            return
        stages = self._stages(read.takers)
        states = read.tap.layout.tokens(value, self.count) if stages else value
        for stage in stages:
            stage.take(source, states)

    def _stages(self, takers: Takers) -> list[Stage]:
        known = self.stages.get(id(takers))
        if known is None:
            known = self.stages[id(takers)] = takers.stages(self.spans, self.count)
        return known

    def attended(self, call: AttentionCall) -> None:
        """Capture attention weights."""
        site: Site = (call.module, "attention")
        for read in self.batch.reads.get(site, ()):
            for stage in self._stages(read.takers):
                for span, recording in stage.takers:
                    weights = attention_weights(call, span.row, span.count, span.start + span.count)
                    positions = recording.chosen.within(span.start, span.count)
                    taken = weights[places(positions, span.start, weights)]
                    self.own.append(Own(recording, (*site, read.tap.item, read.call), taken[None]))

    def commit(self, copies: Copies) -> None:
        """Give the recordings what the forward has captured."""
        stages = [stage for each in self.stages.values() for stage in each if stage.tensors]
        tensors = [tensor for stage in stages for tensor in stage.tensors.values()]
        copied = iter(copies.of([*tensors, *(own.tensor for own in self.own)]))
        pieces: dict[int, list[Piece]] = {}
        whole: dict[int, dict[Source, Piece]] = {}
        for stage in stages:
            found = {source: next(copied) for source in stage.tensors}
            for place, (_, recording) in enumerate(stage.takers):
                pieces.setdefault(id(recording), []).append((found, place))
        for own in self.own:
            piece: Piece = ({own.source: next(copied)}, 0)
            if own.whole:
                whole.setdefault(id(own.recording), {})[own.source] = piece
            else:
                pieces.setdefault(id(own.recording), []).append(piece)
        for span in self.spans:
            for recording in span.inspected.recordings:
                key = id(recording)
                recording.commit(span.start, span.count, pieces.get(key, ()), whole.get(key, {}))


_local = threading.local()


class Inspecting:
    """Surrounds the forwards of one model."""

    def __init__(self) -> None:
        self._copies = Copies()
        self._batch: Batch | None = None

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
        batch = self._batch_of(spans, len(sequences))
        plan = Plan(batch, spans, len(sequences))
        with ExitStack() as stack:
            for site in batch.reads:
                stack.enter_context(_hooked(site))
            if any(side == "attention" for _, side in batch.reads):
                stack.enter_context(watched_attention(plan.attended))
            _local.plan = plan
            try:
                yield
            finally:
                _local.plan = None
        plan.commit(self._copies)

    def _batch_of(self, spans: Sequence[Span], count: int) -> Batch:
        """What is worked out once for the same sequences: that of the last forward, if it was theirs."""
        inspected = [(span.row, span.inspected) for span in spans]
        if self._batch is None or not self._batch.is_of(inspected, count):
            self._batch = Batch(inspected, count)
        return self._batch


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
