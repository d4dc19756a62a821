"""What the figures of a bench depend on: processor, memory, load and versions."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from deployments.core.installed import installed_version

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")
_PACKAGES = ("troupe-serve", "torch", "transformers", "ray", "ctranslate2", "sglang")
_THREADS = "OMP_NUM_THREADS"


def conditions() -> dict[str, Any]:
    """Of this machine, at this moment."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "copy_gb_s": round(_copied(), 1),
        "load": load(),
        "threads_variable": os.environ.get(_THREADS),
        "python": sys.version.split()[0],
        "versions": {name: installed_version(name) for name in _PACKAGES},
    }


def load() -> list[float]:
    """Load averages of 1, 5 and 15 minutes."""
    return [round(each, 1) for each in os.getloadavg()]


def _processor() -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in facts.items()}
    flags = set((found.get("flags") or found.get("Features") or "").split())
    return {"name": found.get("model name", platform.processor()), "isa": [flag for flag in _FLAGS if flag in flags]}


def _copied(size: int = 1 << 27) -> float:
    """Gigabytes per second that one core reads and writes, the best of several copies."""
    source, target = bytes(size), memoryview(bytearray(size))
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - begun)
    return 2 * size / best / 1e9
