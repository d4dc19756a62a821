"""The README and the pages under docs/: their code blocks, and which of them a reader can run from top to bottom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_HEADING = re.compile(r"^(#{1,3}) (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A code block.

    Attributes:
        page: its page, relative to the repository.
        heading: the heading it stands under.
        language: such as bash, python, yaml, json; `text` is the output of the block before it.
        title: the file that the reader saves it as.
        output: the text block right after it, if there is one.
    """

    page: str
    heading: str
    language: str
    title: str | None
    text: str
    line: int
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page in order; a `text` block belongs to the block that it follows."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in _BLOCK.finditer(text):
        body = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        if match["language"] == "text" and found and not _HEADING.search(text, end, match.start()):
            before = found.pop()
            assert before.output is None, f"{before} has two outputs"
            found.append(replace(before, output=body))
        else:
            headings = _headings(text, match.start())
            found.append(
                Block(
                    page=page.relative_to(ROOT).as_posix(),
                    heading=headings[-1] if headings else "",
                    language=match["language"],
                    title=match["title"],
                    text=body,
                    line=text.count("\n", 0, match.start()) + 1,
                )
            )
        end = match.end()
    return found


def _headings(text: str, end: int) -> list[str]:
    """Headings before a place that are not inside a code block."""
    outside = _BLOCK.sub(lambda match: re.sub(r"^#", " ", match[0], flags=re.MULTILINE), text[:end])
    return [match[2] for match in _HEADING.finditer(outside)]


def all_blocks() -> Iterator[Block]:
    for page in PAGES:
        yield from blocks(page)


def sections(page: Path) -> dict[str, list[Block]]:
    """The blocks of a page by their headings."""
    found: dict[str, list[Block]] = {}
    for block in blocks(page):
        found.setdefault(block.heading, []).append(block)
    return found
