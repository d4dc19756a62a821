"""The script that measures Troupe on a GPU, on a CPU: every part runs, and none takes the others along."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "bench_gpu"
QUICK = ["facts", "attention", "steps", "capture", "sampling", "adapters", "swap", "inside"]
LONG = ["right", "engine", "others", "compiled"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    loader = SourceFileLoader("bench_gpu", str(SCRIPT))
    spec = importlib.util.spec_from_loader("bench_gpu", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("parts", [QUICK, pytest.param(LONG, marks=pytest.mark.long)], ids=["quick", "long"])
def test_every_part_runs_on_a_cpu(parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--json", str(file), "--parts", *parts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=400)
    results = json.loads(file.read_text())
    states = {name: part["state"] for name, part in results["parts"].items()}
    optional = {"adapters"}
    assert {name: state for name, state in states.items() if name not in optional} == {
        name: "measured" for name in parts if name not in optional
    }, done.stdout + done.stderr
    assert all(results["parts"][name]["reason"] for name in optional & set(parts) if states[name] == "skipped")
    marks = [mark for part in results["parts"].values() for mark in part.get("marks", ())]
    assert [mark for mark in marks if mark["passed"] is False] == []
    assert all(mark["name"] in done.stdout for mark in marks)
    assert results["conditions"]["torch"] == torch.__version__
    assert done.returncode == 0


def test_a_part_that_hangs_dies_or_raises_leaves_the_others(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"

    def hangs(setting: Any) -> Any:
        assert "hangs" not in json.loads(file.read_text())["parts"], "what was measured before is written"
        time.sleep(600)

    def dies(setting: Any) -> Any:
        os.kill(os.getpid(), 9)

    def raises(setting: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def good(setting: Any) -> Any:
        return {"rows": 1}, [setting.mark("good", 1, "1", True), setting.mark("bad", 2, "1", False)]

    measures = {"first": good, "hangs": hangs, "dies": dies, "raises": raises, "good": good, "late": good}
    parts = {name: bench.Part(name, measure, 3.0, "") for name, measure in measures.items()}
    monkeypatch.setattr(bench, "PARTS", parts)
    names = [name for name in measures if name != "late"]
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--device", "cpu", "--tiny", "--json", str(file), "--parts", *names])
    assert bench.main() == 1
    found = json.loads(file.read_text())["parts"]
    assert found["hangs"]["reason"] == "killed after 3 s"
    assert found["dies"]["reason"] == "its process ended with status -9"
    assert "illegal memory access" in found["raises"]["reason"]
    assert "in raises" in found["raises"]["traceback"]
    assert found["good"]["figures"] == {"rows": 1}
    assert "| good | bad | 2 | 1 | **no** |" in capsys.readouterr().out
    late = bench.run(parts["late"], bench.Setting("cpu", True), time.monotonic() + 1, {"parts": {}})
    assert late["state"] == "skipped"
    assert late["reason"] == "no time was left"


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, bench: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--device", "cuda:7"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert "torch cannot use cuda:7 (" in capsys.readouterr().err


def test_where_the_device_was_touched_parts_are_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, bench: Any
) -> None:
    """Importing a library may ask for the GPU; what is forked then cannot use it."""
    started: list[str] = []

    def run(part: Any, setting: Any, deadline: float, results: Any, start: str) -> dict[str, Any]:
        started.append(start)
        if start == "fork":
            return {"state": "failed", "reason": "RuntimeError: Cannot re-initialize CUDA in forked subprocess."}
        return {"state": "measured"}

    monkeypatch.setattr(bench, "run", run)
    assert bench.method("cuda") == ("spawn", None)
    assert started == ["fork", "spawn"]


def test_buffers_are_read_as_tokens_without_a_copy(bench: Any) -> None:
    """What flash attention is given in place of a batch's buffers."""
    from gpu_parts.hardware import token_major

    buffer = torch.randn(3, 2, 10, 4)
    tokens = token_major(buffer)
    for row in range(3):
        for column in range(10):
            assert torch.equal(tokens[row * 20 + column], buffer[row, :, column])
    assert tokens.data_ptr() == buffer.data_ptr()
