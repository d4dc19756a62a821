"""Every row of docs/from points to a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs" / "from").glob("*.md"))


def links(page: Path) -> list[tuple[str, Path]]:
    """The text and the file of every link to a place in this repository."""
    found = re.findall(r"\[([^\]]+)\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return [(text, page.parent / target) for text, target in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for text, file in links(page):
        assert file.is_file(), f"{text}: {file}"
        if text.startswith("test_"):
            assert re.search(rf"^def {text}\(", file.read_text(encoding="utf-8"), re.MULTILINE), text


def test_the_table_has_every_page() -> None:
    (table,) = [page for page in PAGES if page.name == "README.md"]
    listed = {file.name for _, file in links(table)}
    assert {page.name for page in PAGES} - {"README.md"} <= listed
