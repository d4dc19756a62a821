"""The figures of a bench: from requests to medians over the rounds, and their table."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")
FIGURES = {
    "tokens_per_s": "tokens/s",
    "first_p50_ms": "first token, ms",
    "first_p99_ms": "p99",
    "gap_p50_ms": "gap, ms",
    "gap_p99_ms": "p99",
}


def figures(measured: Mapping[str, Any]) -> dict[str, float]:
    """Of one run: tokens per second, milliseconds until the first text and between two pieces, errors and so on.

    Long prompts beside the conversations count for `long_prompts` and `errors` alone.
    """
    requests = measured["requests"]
    good = [each for each in requests if not each["error"] and not each["long"]]
    firsts = sorted(each["first"] for each in good if each["first"])
    gaps = sorted(gap for each in good for gap in each["gaps"])
    return {
        "tokens_per_s": sum(each["tokens"] for each in good) / measured["seconds"],
        "requests_per_s": len(good) / measured["seconds"],
        "first_p50_ms": 1e3 * quantile(firsts, 0.5),
        "first_p99_ms": 1e3 * quantile(firsts, 0.99),
        "gap_p50_ms": 1e3 * quantile(gaps, 0.5),
        "gap_p99_ms": 1e3 * quantile(gaps, 0.99),
        "prompt_tokens": sum(each["prompt_tokens"] for each in good) / max(1, len(good)),
        "long_prompts": float(sum(each["long"] for each in requests)),
        "errors": float(sum(bool(each["error"]) for each in requests)),
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which a share of ordered values lies; 0 if there are none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, and how far apart the least and the most tokens per second are, as a share."""
    found: dict[str, Any] = {name: median(each[name] for each in rounds) for name in rounds[0]}
    rates = [each["tokens_per_s"] for each in rounds]
    found["errors"] = sum(each["errors"] for each in rounds)
    found["spread"] = (max(rates) - min(rates)) / found["tokens_per_s"] if found["tokens_per_s"] else 0.0
    return found


def against(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """For each target: the first one's tokens per second divided by its own, the median over the rounds."""
    first = next(iter(rounds.values()))
    return {
        name: median(
            mine["tokens_per_s"] / other["tokens_per_s"] if other["tokens_per_s"] else 0.0
            for mine, other in zip(first, others, strict=True)
        )
        for name, others in rounds.items()
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Every figure, as a table of Markdown."""
    head = ["workload", "at a time", "server", *FIGURES.values(), "spread", "errors", "times"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for each in results:
        cells = [each["workload"], str(each["concurrency"]), each["target"]]
        cells += [f"{each[name]:.1f}" for name in FIGURES]
        cells += [f"{100 * each['spread']:.0f} %", f"{each['errors']:.0f}", f"{each['times']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def conditions() -> dict[str, Any]:
    """What the figures depend on: processor, memory bandwidth, load, versions."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "copy_gb_s": _copied(),
        "load": os.getloadavg(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in ("troupe-serve", "torch", "transformers", "ctranslate2")},
    }


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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
