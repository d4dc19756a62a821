"""Vectors for interventions: in a request, uploaded, or read from files of other tools."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deployments.inside_client.capture import fetched


def pack(vector: Any) -> dict[str, Any]:
    """A vector, [width] or [positions, width], as the field `vector` of an intervention."""
    numbers = _numbers(vector)
    return {"dtype": "float32", "shape": list(numbers.shape), "data": base64.b64encode(numbers.tobytes()).decode()}


def upload(base_url: Any, vector: Any, *, api_key: str | None = None) -> dict[str, str]:
    """Send a vector to the server; `{"id": ...}`, for the field `vector` of any number of requests.

    Args:
        base_url: of the server, with or without /v1.

    Raises:
        urllib.error.HTTPError: the server refuses it.
    """
    url = f"{str(base_url).rstrip('/').removesuffix('/v1')}/v1/vectors"
    return {"id": str(json.loads(fetched(url, api_key, safetensors_bytes(vector)))["id"])}


def safetensors_bytes(vector: Any) -> bytes:
    """The file that POST /v1/vectors takes."""
    numbers = _numbers(vector)
    entry = {"dtype": "F32", "shape": list(numbers.shape), "data_offsets": [0, numbers.nbytes]}
    header = json.dumps({"vector": entry}).encode()
    header += b" " * (-len(header) % 8)
    data: bytes = numbers.tobytes()
    return len(header).to_bytes(8, "little") + header + data


def _numbers(vector: Any) -> Any:
    """float32 numbers of a tensor, an array or a list."""
    if hasattr(vector, "detach"):
        vector = vector.detach().float().cpu().numpy()
    return np.ascontiguousarray(vector, dtype="<f4")


def read_vectors(path: str | Path) -> dict[str, Any]:
    """The vectors of a file by name, as float32 arrays.

    Args:
        path: a gguf file of control vectors (`direction.{layer}`, as repeng and llama.cpp write them), or a `.pt` file
            with a dict of tensors or of dicts that have `steering_vector`, as lm-evaluation-harness reads it. A `.pt`
            file needs torch, and is read as weights only.

    Raises:
        ValueError: it is another file.
    """
    path = Path(path)
    if path.suffix == ".pt":
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError(f"{path} has {type(found).__name__}; a dict of vectors is expected")
        vectors = {name: each["steering_vector"] if isinstance(each, dict) else each for name, each in found.items()}
        return {name: _numbers(vector) for name, vector in vectors.items()}
    with path.open("rb") as file:
        return _gguf(file)


# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: "<f4", 1: "<f2"}


def _gguf(file: BinaryIO) -> dict[str, Any]:
    if file.read(4) != b"GGUF":
        raise ValueError("this is not a gguf file")
    _scalar(file, "I")
    tensors, values = _scalar(file, "Q"), _scalar(file, "Q")
    aligned = 32
    for _ in range(values):
        name, value = _text(file), _value(file, _scalar(file, "I"))
        aligned = value if name == "general.alignment" else aligned
    infos = []
    for _ in range(tensors):
        name, dims = _text(file), [_scalar(file, "Q") for _ in range(_scalar(file, "I"))]
        infos.append((name, dims, _scalar(file, "I"), _scalar(file, "Q")))
    start = -(-file.tell() // aligned) * aligned
    found = {}
    for name, dims, kind, offset in infos:
        if kind not in _FLOATS:
            raise ValueError(f"tensor {name!r} is quantized; only f32 and f16 are read")
        file.seek(start + offset)
        dtype = np.dtype(_FLOATS[kind])
        count = int(np.prod(dims))
        found[name] = np.frombuffer(file.read(count * dtype.itemsize), dtype).reshape(dims[::-1]).astype("<f4")
    return found


def _scalar(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_scalar(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner = _scalar(file, "I")
        return [_value(file, inner) for _ in range(_scalar(file, "Q"))]
    return _scalar(file, _SCALARS[kind])
