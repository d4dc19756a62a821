"""A drawing of a bench: tokens per second, first tokens and gaps for each number of conversations at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deployments.cli.output.drawing import COLORS, label, opening

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 300, 200, 48, 36, 12, 28
_PANELS = (("tokens_per_s", "tokens/s"), ("first_p50_ms", "first token, median, ms"), ("gap_p99_ms", "gap, p99, ms"))
_BARS = 0.8
"""Share of a group's width that has bars."""
Result = Mapping[str, Any]


def svg(results: Sequence[Result]) -> str:
    """A row of panels for each workload, a bar for each server; a line in a bar goes from the least to the most."""
    results = [each for each in results if not each.get("refused")]
    workloads = list(dict.fromkeys(each["workload"] for each in results))
    targets = list(dict.fromkeys(each["target"] for each in results))
    width, height = _WIDTH * len(_PANELS), 30 + _HEIGHT * len(workloads)
    lines = opening(width, height, "troupe bench")
    for number, name in enumerate(targets):
        x = 16 + 150 * number
        lines.append(f'<rect x="{x}" y="10" width="10" height="10" fill="{COLORS[number % len(COLORS)]}"/>')
        lines.append(label(x + 15, 19, name))
    for row, workload in enumerate(workloads):
        some = [each for each in results if each["workload"] == workload]
        for column, (figure, title) in enumerate(_PANELS):
            at = _WIDTH * column, 30 + _HEIGHT * row
            lines += _panel(some, targets, figure, f"{workload}: {title}", at)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(
    results: Sequence[Result], targets: Sequence[str], figure: str, title: str, at: tuple[int, int]
) -> Iterator[str]:
    steps = sorted({each["concurrency"] for each in results})
    most = max(max(_range(each, figure)) for each in results) or 1.0
    left, top = at[0] + _LEFT, at[1] + _TOP
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    yield label(at[0] + 8, at[1] + 22, title, "title")
    yield f'<path class="axis" d="M{left} {top}V{top + high}H{left + wide}"/>'
    yield label(at[0] + 8, top + 8, f"{most:.3g}" if most < 1000 else f"{most:.0f}")
    yield label(at[0] + 8, top + high, "0")
    group = wide / len(steps)
    bar = min(_BARS * group / len(targets), 24)
    for place, step in enumerate(steps):
        x = left + group * (place + 0.5)
        yield label(x - 4, top + high + 14, str(step))
        found = {each["target"]: each for each in results if each["concurrency"] == step}
        for number, name in enumerate(targets):
            if name in found:
                edge = x + bar * (number - len(targets) / 2)
                least, middle, highest = (top + high * (1 - each / most) for each in _range(found[name], figure))
                base, color = top + high, COLORS[number % len(COLORS)]
                shape = f"M{edge:.1f} {base}V{middle:.1f}h{bar - 1:.1f}V{base}"
                yield f'<path class="bar" fill="{color}" d="{shape}"/>'
                yield f'<path class="axis" d="M{edge + bar / 2 - 0.5:.1f} {least:.1f}V{highest:.1f}"/>'


def _range(result: Result, figure: str) -> tuple[float, float, float]:
    """The least of the rounds, their median and the most."""
    rounds = [each[figure] for each in result["rounds"]]
    return min(rounds), result[figure], max(rounds)
