"""The figures of a bench: from requests to medians over the rounds, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

FIGURES = {
    "tokens_per_s": "tokens/s",
    "first_p50_ms": "first token, ms",
    "first_p99_ms": "p99",
    "gap_p50_ms": "gap, ms",
    "gap_p99_ms": "p99",
    "processor_ms": "processor, ms",
}


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Of one run: tokens per second, milliseconds until the first text and between two pieces, errors and so on.

    `processor_ms` is the processor time of a request in all processes of the server, 0 if it is not known. Long
    prompts beside the conversations count for `long_prompts` and `errors` alone.
    """
    requests = found["requests"]
    good = [each for each in requests if not each["error"] and not each["long"]]
    firsts = sorted(each["first"] for each in good if each["first"])
    gaps = sorted(gap for each in good for gap in each["gaps"])
    return {
        "tokens_per_s": sum(each["tokens"] for each in good) / found["seconds"],
        "requests_per_s": len(good) / found["seconds"],
        "first_p50_ms": 1e3 * quantile(firsts, 0.5),
        "first_p99_ms": 1e3 * quantile(firsts, 0.99),
        "gap_p50_ms": 1e3 * quantile(gaps, 0.5),
        "gap_p99_ms": 1e3 * quantile(gaps, 0.99),
        "processor_ms": 1e3 * found.get("processor_seconds", 0.0) / len(requests),
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


def ratios(first: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> list[float]:
    """The first server's tokens per second divided by another one's in the same round, in ascending order."""
    pairs = zip(first, other, strict=True)
    return sorted(a["tokens_per_s"] / b["tokens_per_s"] if b["tokens_per_s"] else 0.0 for a, b in pairs)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Every figure, as a table of Markdown; a server that refuses a workload has a dash."""
    head = ["workload", "at a time", "server", *FIGURES.values(), "spread", "errors", "times"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for each in results:
        cells = [each["workload"], str(each["concurrency"]), each["target"]]
        if each.get("refused"):
            cells += ["–"] * (len(head) - len(cells))
        else:
            cells += [f"{each[name]:.1f}" if each[name] else "–" for name in FIGURES]
            cells += [f"{100 * each['spread']:.0f} %", f"{each['errors']:.0f}", _times(each["times"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def matrix(results: Sequence[Mapping[str, Any]]) -> str:
    """Tokens per second, a line for each server and a column for each workload, as a table of Markdown.

    In brackets: how many times the first server is as quick.
    """
    columns = list(dict.fromkeys((each["workload"], each["concurrency"]) for each in results))
    cells = {(each["target"], each["workload"], each["concurrency"]): each for each in results}
    names = list(dict.fromkeys(each["target"] for each in results))
    lines = [f"| | {' | '.join(f'{workload}, {at_once}' for workload, at_once in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in names:
        found = (cells.get((name, *column)) for column in columns)
        lines.append(f"| {name} | {' | '.join(_rate(each, name == names[0]) for each in found)} |")
    return "\n".join(lines)


def _rate(result: Mapping[str, Any] | None, is_first: bool) -> str:
    if result is None or result.get("refused"):
        return "–"
    rate = f"{result['tokens_per_s']:.0f}"
    return rate if is_first else f"{rate} ({median(result['times']):.2f})"


def _times(found: Sequence[float]) -> str:
    if found[0] == found[-1]:
        return f"{found[0]:.2f}"
    return f"{median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"
