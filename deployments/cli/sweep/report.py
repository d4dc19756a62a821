"""A sweep for the reader: a table and a drawing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deployments.cli.output.drawing import COLORS, label, opening
from deployments.cli.sweep.results import Result, Score

_ROW, _TOP, _BOTTOM, _SIDE, _PLOT = 22, 34, 26, 16, 320
_LETTER = 6.2
"""Pixels of a letter of the style's font, about."""

_HEAD = ("model", "task", "metric", "score", "95 % interval", "samples", "fingerprint")


def _rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    for result in results:
        for score in result.scores:
            interval = "" if score.low is None or score.high is None else f"{score.low:.4f} to {score.high:.4f}"
            samples = "" if score.samples is None else str(score.samples)
            yield (result.model, score.task, score.metric, f"{score.value:.4f}", interval, samples, result.mark or "")
        if not result.scores:
            yield (result.model, "", "failed", "", "", "", result.mark or "")


def table(results: Sequence[Result]) -> str:
    """The scores, in columns."""
    rows = [_HEAD, *_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(results: Sequence[Result]) -> str:
    """The scores, as a table of Markdown."""
    lines = [_HEAD, ("---",) * len(_HEAD), *_rows(results)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)


def svg(results: Sequence[Result]) -> str:
    """A panel for each metric: a dot for each model, and a line for its interval."""
    metrics = list(dict.fromkeys((score.task, score.metric) for result in results for score in result.scores))
    models = [result.model for result in results if result.scores]
    left = _SIDE + int(_LETTER * max((len(model) for model in models), default=0)) + 10
    panel = _TOP + _ROW * len(models) + _BOTTOM
    lines = opening(left + _PLOT + 90, panel * len(metrics), "troupe eval")
    for number, key in enumerate(metrics):
        found = [
            (result.model, score) for result in results for score in result.scores if (score.task, score.metric) == key
        ]
        lines += _panel(found, models, " ".join(key), (left, panel * number))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(found: Sequence[tuple[str, Score]], models: Sequence[str], title: str, at: tuple[int, int]) -> Iterator[str]:
    left, top = at
    ends = [end for _, score in found for end in (score.low, score.value, score.high) if end is not None]
    least, most = _range(min(ends), max(ends))
    floor = top + _TOP + _ROW * len(models)

    def x(value: float) -> float:
        return left + _PLOT * (value - least) / (most - least)

    yield label(_SIDE, top + 20, title, "title")
    yield f'<path class="axis" d="M{left} {top + _TOP - 6}V{floor}H{left + _PLOT}"/>'
    for value in (least, (least + most) / 2, most):
        yield label(x(value) - 8, floor + 15, f"{value:.4g}")
    for model, score in found:
        number = models.index(model)
        y, color = top + _TOP + _ROW * (number + 0.5), COLORS[number % len(COLORS)]
        yield label(_SIDE, y + 4, model)
        if score.low is not None and score.high is not None:
            yield f'<path class="line" stroke="{color}" d="M{x(score.low):.1f} {y:.1f}H{x(score.high):.1f}"/>'
        yield f'<circle cx="{x(score.value):.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
        yield label(left + _PLOT + 10, y + 4, f"{score.value:.4f}")


def _range(least: float, most: float) -> tuple[float, float]:
    """Of an axis: 0 to 1 for what fits, otherwise all values."""
    if least >= 0 and most <= 1:
        return 0.0, 1.0
    return least, most if most > least else least + 1.0
