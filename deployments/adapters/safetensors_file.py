"""Tensors of a safetensors file as float32 arrays, without torch: https://github.com/huggingface/safetensors#format

The file is read, not mapped: it may be rewritten while its tensors are used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.adapters.refused import AdapterRefused

if TYPE_CHECKING:
    from numpy import ndarray

_HEADER = 8
_LARGEST_HEADER = 100_000_000


def read_tensors(path: Path) -> dict[str, ndarray[Any, Any]]:
    """The tensors by name.

    Raises:
        AdapterRefused: the file is cut short, or has a type of numbers that is not known.
    """
    raw = path.read_bytes()
    length = int.from_bytes(raw[:_HEADER], "little")
    try:
        if not 0 < length <= min(_LARGEST_HEADER, len(raw) - _HEADER):
            raise ValueError("its header is cut short")
        header = json.loads(raw[_HEADER : _HEADER + length])
        return {
            name: _array(raw, _HEADER + length, name, entry) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterRefused(f"{path.name} cannot be read: {error}.") from error


def _array(raw: bytes, start: int, name: str, entry: dict[str, Any]) -> ndarray[Any, Any]:
    import numpy as np

    begin, end = entry["data_offsets"]
    if start + end > len(raw):
        raise ValueError(f"it ends before {name}")
    data, dtype, shape = raw[start + begin : start + end], entry["dtype"], entry["shape"]
    if dtype == "BF16":  # The upper half of a float32.
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype not in ("F16", "F32", "F64"):
        raise ValueError(f"{name} has numbers of type {dtype}; save it as F32, F16 or BF16")
    return np.frombuffer(data, f"<f{int(dtype[1:]) // 8}").astype(np.float32).reshape(shape)
