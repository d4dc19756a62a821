"""Weights that lie in mapped files, read into memory.

transformers and torch map the files of a checkpoint: a tensor's pages are the file's. A trainer that overwrites its
checkpoint in place would change the model while it answers. Files of the Hub's cache are named by their content and
never overwritten, so their weights stay mapped.
"""

from __future__ import annotations

import bisect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from deployments.core.cgroup import free_bytes

logger = logging.getLogger("troupe.host")

_MAPS = Path("/proc/self/maps")
_ENTRY = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(/.*)$", re.MULTILINE)
_NO_STATE = (type, FunctionType, MethodType, ModuleType, str, bytes, int, float, torch.dtype, torch.device)
_FIXED = re.compile(r"^/(dev/|memfd:)|/models--[^/]+/blobs/[^/]+$")


def read_mapped_weights(model: Any) -> int:
    """Copy the weights of a module that lie in files which may change. Blocks.

    Weights that do not fit into free memory stay mapped, with a warning.

    Returns:
        The bytes that were copied. Without `/proc` (Linux) none.
    """
    mapped = _mapped(model) if isinstance(model, torch.nn.Module) else {}
    size = sum(tensor.nbytes for tensor, _ in mapped.values())
    if size > free_bytes() and mapped:
        file = next(iter(mapped.values()))[1]
        logger.warning(
            "%s stays mapped: its %.1f GiB do not fit into free memory. Do not overwrite it while the model is loaded.",
            file,
            size / 2**30,
        )
        return 0
    for tensor, _ in mapped.values():
        tensor.data = tensor.data.clone()
    return size


def _mapped(model: torch.nn.Module) -> dict[int, tuple[Tensor, str]]:
    """The tensors that lie in a file, by identity, with the file."""
    regions = _regions()
    starts = [start for start, _, _ in regions]
    found: dict[int, tuple[Tensor, str]] = {}
    for tensor in _tensors(model) if regions else ():
        address = _address(tensor)
        at = bisect.bisect_right(starts, address) - 1
        if at >= 0 and address < regions[at][1]:
            found[id(tensor)] = (tensor, regions[at][2])
    return found


def _tensors(model: torch.nn.Module) -> Iterator[Tensor]:
    """Every tensor that a model's modules refer to, those in the states of quantized weights too."""
    seen: set[int] = set()
    ahead: list[Any] = [model]
    while ahead:
        found = ahead.pop()
        if id(found) in seen or isinstance(found, _NO_STATE):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
        if isinstance(found, dict):
            ahead.extend(found.values())
        elif isinstance(found, list | tuple | set):
            ahead.extend(found)
        else:
            ahead.extend(getattr(found, "__dict__", {}).values())


def _regions() -> list[tuple[int, int, str]]:
    """Beginning, end and file of every mapping of a file that may change, in order."""
    try:
        entries = _ENTRY.findall(_MAPS.read_text())
    except OSError:
        return []
    return sorted((int(start, 16), int(end, 16), file) for start, end, file in entries if not _FIXED.search(file))


def _address(tensor: Tensor) -> int:
    """Where a tensor's data begins in this process's memory; 0 if it has no place there."""
    try:
        return tensor.data_ptr() if tensor.device.type == "cpu" else 0
    except RuntimeError:  # A subclass that only wraps other tensors.
        return 0
