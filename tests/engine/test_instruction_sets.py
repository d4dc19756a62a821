"""The tests whose numbers depend on the processor, as an older one would run them.

torch and oneDNN choose their kernels by these variables as they do by the processor.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SSE41 = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
RUN = """
import sys, pytest, torch
print(torch.backends.cpu.get_cpu_capability().lower(), flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""
NUMBERS = ("deterministic", "parity", "attention", "fixed_decode", "prompt_logprobs", "prompt_lookup")


def passes(settings: dict[str, str], *names: str) -> None:
    """Run files of tests on the kernels that these settings leave."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"torch has one set of kernels for {platform.machine()}")
    if settings is AVX2 and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    environment = {**os.environ, **settings}
    found = {name: list(Path(__file__).parent.rglob(f"test_{name}.py")) for name in names}
    assert all(found.values()), found
    files = [file for paths in found.values() for file in paths]
    done = subprocess.run(
        [sys.executable, "-c", RUN, "-p", "no:cacheprovider", *files],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[0] == settings["ATEN_CPU_CAPABILITY"]


def test_packed_linears_without_avx512() -> None:
    passes(AVX2, "packed_linear")


@pytest.mark.long
@pytest.mark.parametrize("settings", [AVX2, SSE41], ids=["avx2", "sse4.1"])
def test_every_number(settings: dict[str, str]) -> None:
    passes(settings, "packed_linear", *NUMBERS)
