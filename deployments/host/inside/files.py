"""Files of captured tensors, in the format of safetensors (https://github.com/huggingface/safetensors#format)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    **dict(zip(("float64", "float32", "float16", "bfloat16"), ("F64", "F32", "F16", "BF16"), strict=True)),
    **dict(zip(("int64", "int32", "int16", "int8", "uint8"), ("I64", "I32", "I16", "I8", "U8"), strict=True)),
    "bool": "BOOL",
}
_ALIGNED = 8

Shapes = Mapping[str, tuple[str, Sequence[int]]]
"""The dtype, as torch names it, and the shape of each tensor."""


def header(shapes: Shapes, meta: str) -> bytes:
    """What stands before the numbers: known before they are.

    Args:
        shapes: of the tensors, in the order of their numbers.
        meta: the file's metadata, under the key `meta`.
    """
    entries: dict[str, Any] = {"__metadata__": {"meta": meta}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def data_bytes(shapes: Shapes) -> int:
    """Bytes of the numbers."""
    return sum(torch.Size(shape).numel() * getattr(torch, dtype).itemsize for dtype, shape in shapes.values())


def numbers(tensors: Mapping[str, Tensor], shapes: Shapes) -> Iterator[memoryview]:
    """The numbers of the tensors, in the order of their header.

    They are not copied: a copy of many MiB would hold Python's lock, and with it the event loop.

    Raises:
        ValueError: a tensor is not as its header says.
    """
    for name, (dtype, shape) in shapes.items():
        tensor = tensors[name]
        if list(tensor.shape) != list(shape) or tensor.dtype is not getattr(torch, dtype):
            raise ValueError(f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
        yield tensor.contiguous().flatten().view(torch.uint8).numpy().data
