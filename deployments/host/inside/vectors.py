"""Vectors that clients have uploaded, by their content."""

from __future__ import annotations

import hashlib
import json
import math
import time

from deployments.core.calls import Vector
from deployments.core.errors import BadRequest

_DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
MOST_BYTES = 16 << 20


class VectorStore:
    """Vectors in memory, each kept until it was not used for a while.

    Args:
        ttl: how long, in seconds.
    """

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._vectors: dict[str, tuple[Vector, float]] = {}

    def put(self, data: bytes) -> str:
        """Keep the tensor `vector` of a safetensors file; the same bytes have the same id.

        Raises:
            BadRequest: it is not such a file, or too large.
        """
        self._expire()
        vector_id = f"vec-{hashlib.sha256(data).hexdigest()}"
        self._vectors[vector_id] = (read_vector(data), time.monotonic())
        return vector_id

    def get(self, vector_id: str, param: str) -> Vector:
        """The vector of an id.

        Raises:
            BadRequest: there is none, or no longer.
        """
        self._expire()
        if vector_id not in self._vectors:
            raise BadRequest(
                f"Invalid {param!r}: there is no vector {vector_id[:100]!r}; send it to POST /v1/vectors (again).",
                param=param,
                code="unknown_vector",
            )
        vector, _ = self._vectors[vector_id]
        self._vectors[vector_id] = (vector, time.monotonic())
        return vector

    def _expire(self) -> None:
        oldest = time.monotonic() - self._ttl
        self._vectors = {name: held for name, held in self._vectors.items() if held[1] >= oldest}


def read_vector(data: bytes) -> Vector:
    """The only tensor of a safetensors file, named `vector`.

    Raises:
        BadRequest: it is another file.
    """
    if len(data) > MOST_BYTES:
        raise _invalid(f"it has {len(data)} bytes; at most {MOST_BYTES} are read")
    length = int.from_bytes(data[:8], "little")
    try:
        tensors = json.loads(data[8 : 8 + length])
        tensors.pop("__metadata__", None)
        (entry,) = [tensors["vector"]] if len(tensors) == 1 else []
        dtype, size = _DTYPES[entry["dtype"]]
        shape = tuple(int(each) for each in entry["shape"])
        start, end = entry["data_offsets"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _invalid("it should be a safetensors file with one tensor 'vector' of F32, F16 or BF16") from error
    count = math.prod(shape)
    numbers = data[8 + length + start : 8 + length + end]
    if len(shape) not in (1, 2) or len(numbers) != count * size or not count:
        raise _invalid(f"its shape is {list(shape)}, and {len(numbers)} bytes of numbers follow")
    return Vector(data=numbers, dtype=dtype, shape=shape)


def _invalid(reason: str) -> BadRequest:
    return BadRequest(f"Invalid vector: {reason}.", code="vector_shape")
