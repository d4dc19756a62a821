"""`deployments.inside_client` reads what the server writes, with torch and without."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load as load_safetensors

from deployments.host.inside.files import header, numbers
from deployments.host.inside.vectors import read_vector
from deployments.inside_client import load_capture, pack, read_vectors
from deployments.inside_client.vectors import safetensors_bytes

STATES = torch.tensor([[1.5, -2.25, 3e-5], [0.0, -0.0, 700.0]], dtype=torch.bfloat16)
TENSORS = {"states": STATES, "positions": torch.tensor([4, 9]), "token_ids": torch.tensor([7, 7])}
SHAPES = {name: (str(each.dtype).removeprefix("torch."), list(each.shape)) for name, each in TENSORS.items()}
FILE = b"".join([header(SHAPES, '{"model": "m"}'), *numbers(TENSORS, SHAPES)])


def test_a_file_of_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "states.safetensors"
    path.write_bytes(FILE)
    for source in (FILE, path, str(path)):
        found = load_capture(source)
        assert torch.equal(found["states"], STATES)
        assert (found.positions.tolist(), found.token_ids.tolist(), found.meta) == ([4, 9], [7, 7], {"model": "m"})
        assert list(found) == ["states"]
    with safetensors.safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("states"), STATES)
    with pytest.raises(ValueError, match="safetensors"):
        load_capture(b"12345678{")


def test_without_torch_bfloat16_is_float32(tmp_path: Path) -> None:
    (tmp_path / "states").write_bytes(FILE)
    code = (
        "import sys; from deployments.inside_client import load_capture\n"
        f"found = load_capture({str(tmp_path / 'states')!r})['states']\n"
        "print(found.dtype, found.tolist(), 'torch' in sys.modules, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"float32 {STATES.float().tolist()} False False"


def test_vectors_are_packed_and_read() -> None:
    for vector in (torch.ones(3), np.ones(3), [1.0, 1.0, 1.0]):
        assert pack(vector) == {"dtype": "float32", "shape": [3], "data": "AACAPwAAgD8AAIA/"}
    data = safetensors_bytes(torch.arange(6.0).reshape(2, 3))
    assert torch.equal(load_safetensors(data)["vector"], torch.arange(6.0).reshape(2, 3))
    assert read_vector(data).shape == (2, 3)


def test_vectors_of_other_tools(tmp_path: Path) -> None:
    torch.save({"layers.3": {"steering_vector": torch.ones(4), "action": "add"}}, tmp_path / "lm_eval.pt")
    assert read_vectors(tmp_path / "lm_eval.pt")["layers.3"].tolist() == [1.0] * 4

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    head += text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    head += text("counts") + struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 1, 2)
    head += text("direction.7") + struct.pack("<IQIQ", 1, 4, 0, 0)
    numbers_at = -(-len(head) // 32) * 32
    (tmp_path / "v.gguf").write_bytes(head.ljust(numbers_at, b"\0") + np.arange(4, dtype="<f4").tobytes())
    assert read_vectors(tmp_path / "v.gguf")["direction.7"].tolist() == [0.0, 1.0, 2.0, 3.0]
    (tmp_path / "other.gguf").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="gguf"):
        read_vectors(tmp_path / "other.gguf")
