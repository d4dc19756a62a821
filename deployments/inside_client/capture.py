"""The file of a capture as tensors."""

from __future__ import annotations

import base64
import json
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Capture(Mapping[str, Any]):
    """Captured states by name: torch tensors if torch is imported, else numpy arrays with bfloat16 as float32.

    Attributes:
        positions: int64 [P], of the tokens whose states these are.
        token_ids: int64 [P], the token at each position.
        meta: what the states are of: model, fingerprint, numbers of tokens, versions.
    """

    positions: Any
    token_ids: Any
    meta: dict[str, Any]
    tensors: dict[str, Any] = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def load_capture(source: Any, handle: Mapping[str, Any] | None = None, *, api_key: str | None = None) -> Capture:
    """A capture.

    Args:
        source: the file as a path or as bytes; or the URL of the server (`client.base_url`) for a handle; or a handle
            with its data in it; or the URL of the capture.
        handle: `choice.capture` of the answer.
        api_key: for the server.

    Raises:
        urllib.error.HTTPError: the server does not give the file.
        ValueError: it is not a safetensors file.
    """
    return _parsed(_bytes(source, handle, api_key))


def _bytes(source: Any, handle: Mapping[str, Any] | None, api_key: str | None) -> bytes:
    handle = source if isinstance(source, Mapping) else handle
    if handle is not None and "data" in handle:
        return base64.b64decode(handle["data"])
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if handle is not None or str(source).startswith(("http://", "https://")):
        return fetched(_url(str(source), handle), api_key)
    return Path(source).read_bytes()


def _url(base: str, handle: Mapping[str, Any] | None) -> str:
    if handle is None:
        return base
    parts = urlsplit(base)
    before = parts.path.rstrip("/").removesuffix("/v1")
    # Under a model's own path the server has the same captures.
    before = before.partition("/models/")[0]
    return f"{parts.scheme}://{parts.netloc}{before}{handle['url']}"


def fetched(url: str, api_key: str | None, body: bytes | None = None) -> bytes:
    """What the server answers; `body` is sent to it."""
    request = urllib.request.Request(url, body, {} if body is None else {"content-type": "application/octet-stream"})
    if api_key is not None:
        request.add_header("authorization", f"Bearer {api_key}")
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        data: bytes = answer.read()
    return data


def _parsed(data: bytes) -> Capture:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:
        raise ValueError("this is not a safetensors file") from error
    meta = json.loads((header.pop("__metadata__", None) or {}).get("meta", "{}"))
    body = memoryview(data)[8 + length :]
    tensors = {name: _tensor(entry, body) for name, entry in header.items()}
    return Capture(tensors.pop("positions", None), tensors.pop("token_ids", None), meta, tensors)


def _tensor(entry: Mapping[str, Any], body: memoryview) -> Any:
    start, end = entry["data_offsets"]
    numbers = np.frombuffer(body[start:end], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    torch = sys.modules.get("torch")
    if torch is not None:
        tensor = torch.from_numpy(numbers.copy())
        return tensor.view(torch.bfloat16) if entry["dtype"] == "BF16" else tensor
    if entry["dtype"] == "BF16":
        return (numbers.astype("<u4") << 16).view("<f4")
    return numbers.copy()
