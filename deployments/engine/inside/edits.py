"""Interventions: what becomes of the states of one sequence at one place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deployments.core.calls import Intervention
from deployments.engine.inside.positions import Chosen

Hook = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """An intervention at one module.

    Attributes:
        module: its name, for the loader's hook.
        item: which tensor of a tuple is changed.
        call: which call of the module in a forward; None is every one.
        chosen: the positions.
        vector: float32 [width], or [positions, width] with the place of each position in `places`.
        columns: those that are changed; None is all.
        hook: the loader's, for `hook`.
    """

    asked: Intervention
    module: str
    item: int
    call: int | None
    chosen: Chosen
    vector: Tensor | None = None
    places: Mapping[int, int] = field(default_factory=dict)
    columns: Tensor | None = None
    hook: Hook | None = None

    @property
    def is_sum(self) -> bool:
        """Whether the same vector is added to every state."""
        plain = self.asked.op == "add" and not self.asked.norm_match and self.columns is None
        return plain and self.vector is not None and self.vector.dim() == 1

    def added(self, dtype: torch.dtype) -> Tensor:
        """What is added to every state, if it is a sum."""
        assert self.vector is not None
        return (self.asked.scale * self.vector).to(dtype)

    def apply(self, states: Tensor, positions: Sequence[int]) -> Tensor:
        """The changed states.

        Args:
            states: [positions, ..., width]; not changed.
            positions: of the states.

        Raises:
            Exception: whatever the loader's hook raises.
        """
        if self.hook is not None:
            return self._hooked(self.hook, states, positions)
        whole = states if self.columns is None else states[..., self.columns]
        changed = self._changed(whole, self._vector(whole, positions)).to(states.dtype)
        if self.columns is None:
            return changed
        result = states.clone()
        result[..., self.columns] = changed
        return result

    def _vector(self, states: Tensor, positions: Sequence[int]) -> Tensor | None:
        """The vector of each position, in a shape that goes with the states."""
        if self.vector is None or self.vector.dim() == 1:
            return self.vector
        places = torch.tensor([self.places[position] for position in positions])
        # A list would make a GPU wait.
        rows = self.vector[places.to(self.vector.device, non_blocking=True)]
        return rows.view(len(positions), *[1] * (states.dim() - 2), rows.shape[-1])

    def _changed(self, states: Tensor, vector: Tensor | None) -> Tensor:
        match self.asked.op:
            case "zero":
                return torch.zeros_like(states)
            case "scale":
                return states * self.asked.scale
            case "clamp":
                return _clamped(states.float(), vector, self.asked)
        assert vector is not None
        if self.asked.op == "set":
            return vector.to(states.dtype).expand_as(states)
        if self.asked.norm_match:
            size = states.float().norm(dim=-1, keepdim=True)
            vector = vector / vector.norm(dim=-1, keepdim=True) * size
        return states + (self.asked.scale * vector).to(states.dtype)

    def _hooked(self, hook: Hook, states: Tensor, positions: Sequence[int]) -> Tensor:
        given = states.clone()
        found: Any = hook(given, module=self.module, positions=list(positions), args=json.loads(self.asked.args))
        if found is None:
            return given
        if not isinstance(found, Tensor) or found.shape != states.shape:
            got = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"it returned {got}; a tensor of shape {list(states.shape)} or None is expected")
        changed: Tensor = found.to(states.dtype)
        return changed


def _clamped(states: Tensor, vector: Tensor | None, asked: Intervention) -> Tensor:
    """Coordinates along a vector, or the numbers themselves, brought to a value or into bounds."""
    if vector is None:
        return _bounded(states, asked)
    along: Tensor = vector / vector.norm(dim=-1, keepdim=True)
    found: Tensor = (states * along).sum(-1, keepdim=True)
    return states + (_bounded(found, asked) - found) * along


def _bounded(numbers: Tensor, asked: Intervention) -> Tensor:
    if asked.value is not None:
        return torch.full_like(numbers, asked.value)
    return numbers.clamp(asked.min, asked.max)
