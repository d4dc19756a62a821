"""A flame graph as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape

from deployments.cli.output.drawing import COLORS, opening

_WIDTH, _ROW, _LEAST, _LETTER = 1200, 15, 1.5, 6.2
_DEEPEST = 60


@dataclass(slots=True)
class Frame:
    """A function and what it calls.

    Attributes:
        seconds: in which it was on the stack.
    """

    name: str
    seconds: float = 0.0
    calls: dict[str, Frame] = field(default_factory=dict)


def drawn(stacks: Mapping[tuple[str, ...], float], title: str) -> str:
    """Seconds by stack, from the outermost frame in; a frame is as wide as its share, callers are above."""
    root = Frame("all")
    for stack, seconds in stacks.items():
        frame = root
        frame.seconds += seconds
        for name in stack[:_DEEPEST]:
            frame = frame.calls.setdefault(name, Frame(name))
            frame.seconds += seconds
    # What has no branch above the first one says nothing.
    while len(root.calls) == 1:
        root = next(iter(root.calls.values()))
    boxes = list(_boxes(root, 0.0, 0, _WIDTH / max(1e-9, root.seconds)))
    depth = max(row for _, row, _, _ in boxes) + 1
    lines = opening(_WIDTH, 40 + _ROW * depth, title)
    lines.append(f'<text x="8" y="22" class="title">{escape(title)}</text>')
    lines += (_box(x, row, wide, frame, root.seconds) for x, row, wide, frame in boxes)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _boxes(frame: Frame, x: float, row: int, scale: float) -> Iterator[tuple[float, int, float, Frame]]:
    wide = frame.seconds * scale
    if wide < _LEAST:
        return
    yield x, row, wide, frame
    for each in sorted(frame.calls.values(), key=lambda each: -each.seconds):
        yield from _boxes(each, x, row + 1, scale)
        x += each.seconds * scale


def _box(x: float, row: int, wide: float, frame: Frame, whole: float) -> str:
    function, _, place = frame.name.partition(" (")
    file = place.rstrip(")").rpartition("site-packages/")[2]
    y, color = 32 + _ROW * row, COLORS[hash_of(file) % len(COLORS)]
    said = f"{function} ({file}), {100 * frame.seconds / whole:.1f} %"
    letters = int((wide - 4) / _LETTER)
    text = f'<text x="{x + 2:.1f}" y="{y + 11}">{escape(function[:letters])}</text>' if letters > 2 else ""
    box = f'<rect x="{x:.1f}" y="{y}" width="{wide - 0.5:.1f}" height="{_ROW - 1}" fill="{color}" fill-opacity="0.35"/>'
    return f"<g><title>{escape(said)}</title>{box}{text}</g>"


def hash_of(text: str) -> int:
    """The same number for the same folder in every process."""
    return sum(map(ord, text.rpartition("/")[0]))
