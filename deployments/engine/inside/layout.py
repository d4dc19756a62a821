"""Where the tokens of a sequence are in what a module gives."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Side = Literal["output", "input", "attention"]
Site = tuple[nn.Module, Side]
Source = tuple[nn.Module, Side, int, int]
"""A module, a side, which of its tensors, and which of its calls."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor is sliced by sequence and token.

    Attributes:
        axis: of the tokens. 0: the tokens of all sequences follow each other along this axis; another one: sequences
            are along axis 0. None: the tensor belongs to the only sequence of its forward and has no tokens.
        last: it may have the last token of each sequence alone.
    """

    axis: int | None
    last: bool = False

    @property
    def name(self) -> str:
        """In the catalogue."""
        if self.axis is None:
            return "once"
        return "last" if self.last else "flat" if self.axis == 0 else "tokens"

    def view(self, value: Tensor, row: int, rows: int, count: int) -> Tensor:
        """The last tokens of a sequence.

        Args:
            row: of the sequence.
            rows: sequences of the forward.
            count: new tokens of the sequence in this forward; their positions end in the last column.

        Returns:
            [at most count, ...], a view of `value`; all of it if it has no tokens.
        """
        if self.axis is None:
            return value
        own = self.tokens(value, rows)[row]
        return own[max(0, own.shape[0] - count) :]

    def tokens(self, value: Tensor, rows: int) -> Tensor:
        """[rows, tokens, ...], a view of a tensor that has tokens."""
        return value.view(rows, -1, *value.shape[1:]) if self.axis == 0 else value.movedim(self.axis or 1, 1)


WHOLE = Layout(None)


def items(value: Any) -> list[Tensor | None]:
    """The tensors of what a module gives: it itself, or the entries of a tuple or an output object; None for others."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [entry if isinstance(entry, Tensor) else None for entry in value]
    return []


def replaced(value: Any, index: int, new: Tensor) -> Any:
    """What a module gives, of the same kind, with another tensor at a place of `items`."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        changed[list(value)[index]] = new
        return changed
    entries = [new if place == index else entry for place, entry in enumerate(value)]
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor] | None:
    """The first tensor that a module is called with, and its place or its name."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return next(((place, value) for place, value in places if isinstance(value, Tensor)), None)


def with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another tensor at a place."""
    if isinstance(place, str):
        return args, {**kwargs, place: new}
    return (*args[:place], new, *args[place + 1 :]), kwargs
