"""How many bytes sequences take, and how many there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from deployments.core.cgroup import free_bytes

_CPU_SHARE, _DEVICE_SHARE = 0.5, 0.85


def can_all_finish(budget: int, sequences: Iterable[tuple[int, int]]) -> bool:
    """Whether sequences can end one after the other, each taking over what those before it have left.

    This is the safe state of the banker's algorithm (Dijkstra, EWD 623), for a given order.

    Args:
        budget: bytes in all.
        sequences: what each sequence has now and needs in the end, the first to end first.
    """
    sequences = list(sequences)
    spare = budget - sum(now for now, _ in sequences)
    for now, final in sequences:
        if final - now > spare:
            return False
        spare += now
    return True


def default_budget(device: torch.device) -> int:
    """Bytes for caches when the configuration names none: a share of what is free now, weights already loaded."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + spare) * _DEVICE_SHARE)
    return int(free_bytes() * _CPU_SHARE)


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters; 0 if it has none, as a model of a loader that computes elsewhere."""
    return sum(parameter.nbytes for parameter in getattr(model, "parameters", list)())
