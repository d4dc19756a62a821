"""The pages that a reader follows, from top to bottom: every command runs, and prints what the page shows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.docs.claims import claim
from tests.docs.conftest import by_command, in_process
from tests.docs.pages import DOCS, Block, blocks, sections
from tests.docs.session import Session

COOKBOOK = sections(DOCS / "cookbook.md")


def follow(reader: Session, found: list[Block]) -> None:
    """Run the blocks that no other test claims."""
    for block in found:
        if claim(block) is None and (block.language in ("bash", "python") or block.title is not None):
            reader.run(block)


@pytest.mark.parametrize(
    "reader", [in_process, pytest.param(by_command, marks=pytest.mark.long)], ids=["quick", "real"], indirect=True
)
def test_the_tutorial(reader: Session) -> None:
    follow(reader, blocks(DOCS / "tutorial.md"))


@pytest.mark.parametrize("heading", COOKBOOK)
def test_a_recipe_of_the_cookbook(reader: Session, checkpoint: Path, heading: str) -> None:
    shutil.copytree(checkpoint, reader.folder / "my-checkpoint")
    follow(reader, COOKBOOK[heading])


def test_inside_the_model(reader: Session) -> None:
    follow(reader, blocks(DOCS / "inside.md"))


def test_writing_a_loader(reader: Session, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, reader.folder / "my-checkpoint")
    follow(reader, blocks(DOCS / "write-a-loader.md"))
