"""Draw docs/images/throughput.svg from docs/images/throughput.json, the measurements of docs/performance.md.

python scripts/plot_throughput.py        - prints it instead
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDTH, LEFT, BAR, GAP, TOP, BOTTOM = 760, 90, 15, 14, 88, 46
SCALE = 160
"""Pixels for a ratio of 1."""
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2430 }
  .title { font-weight: 600; font-size: 15px } .note { font-size: 11px; fill: #5b6270 }
  .loop { fill: #9aa5ce } .batching { fill: #3d5bd9 } .one { stroke: #5b6270; stroke-dasharray: 3 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e9f0 } .note { fill: #a4abba }
    .loop { fill: #6c7bb0 } .batching { fill: #7d97ff }
    .one { stroke: #a4abba }
  }
"""


def plot(data: dict[str, Any]) -> str:
    """The measurements as horizontal bars, a group for each number and length of prompts."""
    series = data["series"]
    step = len(series) * BAR + GAP
    height = TOP + step * len(data["rows"]) + BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(data["title"])}">',
        f"<style>{STYLE}</style>",
        _text(16, 24, data["title"], "title"),
    ]
    for number, each in enumerate(series):
        x = 16 + number * 350
        lines += [
            f'<rect class="{each["key"]}" x="{x}" y="40" width="12" height="12"/>',
            _text(x + 18, 51, each["name"]),
        ]
    lines.append(_text(16, 76, "prompts x tokens", "note"))
    for number, row in enumerate(data["rows"]):
        lines += _group(row, [each["key"] for each in series], TOP + number * step)
    one = LEFT + SCALE
    lines.append(f'<line class="one" x1="{one}" y1="{TOP - 6}" x2="{one}" y2="{height - BOTTOM}"/>')
    lines.append(_text(one - 3, height - BOTTOM + 14, "1", "note"))
    lines += [_text(16, height - 10, data["note"], "note"), "</svg>"]
    return "\n".join(lines) + "\n"


def _group(row: dict[str, Any], keys: list[str], top: int) -> Iterator[str]:
    yield _text(16, top + len(keys) * BAR // 2 + 5, row["prompts"])
    for number, key in enumerate(keys):
        y, width = top + number * BAR, row[key] * SCALE
        yield f'<rect class="{key}" x="{LEFT}" y="{y}" width="{width:g}" height="{BAR - 2}"/>'
        yield _text(LEFT + round(width) + 6, y + BAR - 4, f"{row[key]:.2f}")


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(text)}</text>'


if __name__ == "__main__":
    found = plot(json.loads((IMAGES / "throughput.json").read_text(encoding="utf-8")))
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(found)
    else:
        (IMAGES / "throughput.svg").write_text(found, encoding="utf-8")
