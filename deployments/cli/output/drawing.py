"""What the drawings of the commands share: their style, colors and texts, as SVG."""

from __future__ import annotations

from html import escape

COLORS = ("#3d5bd9", "#d9783d", "#2f9e6e", "#a04bc0", "#7a7f8c", "#c03d55", "#1f8aa8")
STYLE = """
  text { font: 11px system-ui, sans-serif; fill: #1f2430 } .title { font-weight: 600; font-size: 13px }
  .axis { stroke: #9aa1ad; fill: none } .line { fill: none; stroke-width: 2 }
  @media (prefers-color-scheme: dark) { text { fill: #e6e9f0 } }
"""


def opening(width: int, height: int, label: str) -> list[str]:
    """The first lines of a drawing; `</svg>` ends it."""
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}"'
    return [f'<svg xmlns="http://www.w3.org/2000/svg" {box}>', f"<style>{STYLE}</style>"]


def label(x: float, y: float, text: str, kind: str = "") -> str:
    """A text, from its lower left corner."""
    return f'<text x="{x:.0f}" y="{y:.0f}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(text)}</text>'
