"""A drawing of a bench: tokens per second, first tokens and gaps against the number of requests at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deployments.cli.output.drawing import COLORS, label, opening

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 300, 220, 52, 56, 12, 34
_PANELS = (
    ("tokens_per_s", "tokens/s"),
    ("first_p50_ms", "first token, median, ms"),
    ("gap_p99_ms", "gap between pieces, p99, ms"),
)
Result = Mapping[str, Any]


def svg(results: Sequence[Result]) -> str:
    """A row of panels for each workload, a line for each server."""
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
    most = max(each[figure] for each in results) or 1.0
    left, top = at[0] + _LEFT, at[1] + _TOP - 20
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM + 20
    yield label(at[0] + 8, at[1] + 22, title, "title")
    yield f'<path class="axis" d="M{left} {top}V{top + high}H{left + wide}"/>'
    yield label(at[0] + 8, top + 8, f"{most:.4g}")
    yield label(at[0] + 8, top + high, "0")
    places = {step: left + wide * (i + 0.5) / len(steps) for i, step in enumerate(steps)}
    for step, x in places.items():
        yield label(x - 4, top + high + 14, str(step))
    for number, name in enumerate(targets):
        color = COLORS[number % len(COLORS)]
        mine = sorted((each for each in results if each["target"] == name), key=lambda each: each["concurrency"])
        points = [(places[each["concurrency"]], top + high * (1 - each[figure] / most)) for each in mine]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        yield f'<path class="line" stroke="{color}" d="M{path}"/>'
        for x, y in points:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
