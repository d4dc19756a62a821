"""The captured states of one sequence, from its forwards to its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deployments.core.calls import Capture
from deployments.engine.inside.catalogue import Tap
from deployments.engine.inside.copies import Copied
from deployments.engine.inside.layout import Source
from deployments.engine.inside.positions import Chosen

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that is captured.

    Attributes:
        label: its name in the answer.
        call: which of several calls of the module in a forward.
    """

    label: str
    tap: Tap
    module: nn.Module
    call: int

    @property
    def source(self) -> Source:
        return self.module, self.tap.side, self.tap.item, self.call

    @property
    def whole(self) -> bool:
        """Whether it has no positions."""
        return self.tap.layout.axis is None

    def bytes_per_position(self, total: int, capture: Capture) -> int:
        """Bytes of one position, or of the whole tensor if it has none.

        Args:
            total: tokens of the sequence.
        """
        keys = total if self.tap.side == "attention" else 1
        return math.prod(self.tap.shape) * keys * self.dtype(capture).itemsize

    def dtype(self, capture: Capture) -> torch.dtype:
        """Of the tensor in the answer."""
        floating = self.tap.dtype.is_floating_point
        return _DTYPES.get(capture.dtype, self.tap.dtype) if floating else self.tap.dtype


Piece = tuple[Mapping[Source, Copied], int]
"""Copies of states that several sequences may share, and the place of this one along their first axis."""


@dataclass(slots=True)
class _Part:
    """What one forward gave: positions in order, and their states."""

    start: int
    positions: Sequence[int]
    pieces: Sequence[Piece]


@dataclass(slots=True, kw_only=True)
class Recording:
    """What is captured of one sequence.

    Attributes:
        capture: what the request asks for.
        wanted: the tensors.
        chosen: their positions.
        prompt: tokens of the prompt.
        callback: it is for the loader's done_callback, not for the client.
    """

    capture: Capture
    wanted: Sequence[Wanted]
    chosen: Chosen
    prompt: int
    callback: bool = False
    _parts: list[_Part] = field(default_factory=list)
    _whole: dict[Source, Piece] = field(default_factory=dict)
    token_ids: Sequence[int] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def commit(self, start: int, count: int, pieces: Sequence[Piece], whole: Mapping[Source, Piece]) -> None:
        """Add what a forward of `count` tokens gave. What was computed from `start` on before is replaced.

        Args:
            pieces: states of the positions that are captured.
            whole: tensors that have no positions.
        """
        while self._parts and self._parts[-1].start >= start:
            self._parts.pop()
        self._whole.update(whole)
        if positions := self.chosen.within(start, count):
            self._parts.append(_Part(start, positions, pieces))

    def end(self, token_ids: Sequence[int], meta: Mapping[str, Any]) -> None:
        """The sequence has these tokens, and nothing more is computed of it."""
        self.token_ids = token_ids
        self.meta = dict(meta)

    @property
    def positions(self) -> list[int]:
        return [position for part in self._parts for position in part.positions]

    @property
    def missing(self) -> str | None:
        """The label of a tensor that no forward gave."""
        return next((each.label for each in self.wanted if each.whole and each.source not in self._whole), None)

    def nbytes(self, total: int) -> int:
        """Bytes of the tensors.

        Args:
            total: tokens of the sequence that the model is given at most.
        """
        count = len(self.chosen.within(0, total))
        return 16 * count + sum(
            wanted.bytes_per_position(total, self.capture) * (1 if wanted.whole else count) for wanted in self.wanted
        )

    def shapes(self) -> dict[str, tuple[str, list[int]]]:
        """The dtype and the shape of each tensor, without computing it."""
        count, total = len(self.positions), len(self.token_ids)
        found = {}
        for wanted in self.wanted:
            lead = [] if wanted.whole else [count]
            tail = [total] if wanted.tap.side == "attention" else []
            dtype = str(wanted.dtype(self.capture)).removeprefix("torch.")
            found[wanted.label] = (dtype, [*lead, *wanted.tap.shape, *tail])
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by label, on the CPU; waits for what is still being copied."""
        found = {}
        for wanted in self.wanted:
            source = wanted.source
            pieces = [self._whole[source]] if wanted.whole else [_piece(part, source) for part in self._parts]
            tensors = [copied[source].tensor()[place] for copied, place in pieces]
            if wanted.tap.side == "attention":
                tensors = [_widened(tensor, len(self.token_ids)) for tensor in tensors]
            dtype, shape = wanted.dtype(self.capture), self.shapes()[wanted.label][1]
            joined = tensors[0] if wanted.whole else torch.cat(tensors) if tensors else torch.empty(shape, dtype=dtype)
            found[wanted.label] = joined.to(dtype).contiguous()
        return found

    def numbered(self) -> dict[str, Tensor]:
        """`positions` and `token_ids`, int64."""
        positions = self.positions
        ids = [self.token_ids[position] for position in positions]
        return {
            "positions": torch.tensor(positions, dtype=torch.int64),
            "token_ids": torch.tensor(ids, dtype=torch.int64),
        }

    def described(self) -> str:
        """The metadata of the file, as JSON."""
        once = [wanted.label for wanted in self.wanted if wanted.whole]
        return json.dumps({**self.meta, "taps": [wanted.label for wanted in self.wanted], "once": once})


def _piece(part: _Part, source: Source) -> Piece:
    """The piece of a part that has a source."""
    return next(piece for piece in part.pieces if source in piece[0])


def _widened(weights: Tensor, total: int) -> Tensor:
    """Attention weights [positions, heads, keys] with zeros for tokens that came later."""
    return torch.nn.functional.pad(weights, (0, total - weights.shape[-1]))
