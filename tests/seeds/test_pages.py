"""Every row of docs/from points to a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
INDEX = ROOT / "docs" / "from" / "README.md"
PAGES = sorted({*INDEX.parent.glob("*.md")} - {INDEX})
# The faults that the sources were read for, by page and heading; each is numbered, and each has a test.
FAULTS = {
    ("troapis", "Known faults, fixed here"): 12,
    ("transformers-openai-api", "Known faults, fixed here"): 14,
    ("transformers-openai-api", "CalunVier's rewrite"): 9,
    ("fastapi_tritonserver", "Known faults, fixed here"): 9,
    ("ctranslate2-fastapi", "Known faults, fixed here"): 6,
    ("alternatives", "transformers-openai-api (jquesnelle, shing100)"): 5,
    ("alternatives", "simpleAI"): 2,
}
PROJECTS = (
    "troapis",
    "transformers-openai-api",
    "CalunVier's rewrite",
    "fastapi_tritonserver",
    "ctranslate2-fastapi",
    "jquesnelle's",
    "simpleAI",
    "FastChat",
)


def links(page: Path) -> list[tuple[str, Path, str]]:
    """The text, the file and the anchor of every link to a place in this repository."""
    found = re.findall(r"\[([^\]]+)\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    return [(text, page.parent / target if target else page, anchor) for text, target, anchor in found]


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(page: str, heading: str) -> str:
    text = (ROOT / "docs" / "from" / f"{page}.md").read_text(encoding="utf-8")
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("page", [README, INDEX, *PAGES], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for text, file, anchor in links(page):
        assert file.exists(), f"{text}: {file}"
        assert not anchor or anchor in anchors(file), f"{text}: {file}#{anchor}"
        if text.startswith("test_"):
            assert re.search(rf"^\s*def {text}\(", file.read_text(encoding="utf-8"), re.MULTILINE), text


def test_there_is_a_row_for_every_project_and_every_page() -> None:
    table = INDEX.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\[.+) \|$", table, re.MULTILINE)
    assert tuple(re.findall(r"\[(.+?)\]", row)[0] for row in rows) == PROJECTS
    for row in rows:
        *cells, faults = row.split(" | ")
        assert re.search(r"\]\([\w-]+\.md", cells[0]), row
        assert all("](../../tests/" in cell for cell in cells[1:]), row
        assert re.match(r"\[\d+\]\([\w-]+\.md#", faults) or faults == "–", row
    assert {page.name for page in PAGES} <= set(re.findall(r"\(([\w-]+\.md)", table))


@pytest.mark.parametrize(("place", "count"), FAULTS.items(), ids=lambda value: str(value))
def test_every_fault_has_a_test(place: tuple[str, str], count: int) -> None:
    numbered = re.findall(r"^\| (\d+) \| .+ \| \[test_\w+\]\(.+\) \|$", section(*place), re.MULTILINE)
    assert [int(number) for number in numbered] == list(range(1, count + 1))


def test_the_table_counts_them() -> None:
    text = INDEX.read_text(encoding="utf-8")
    for (page, heading), count in FAULTS.items():
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        assert f"[{count}]({page}.md#{anchor})" in text
