"""docs/clients.md: what each client needs, and the blocks that the tests run as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "clients.md"


def section(client: str) -> str:
    """The text under a client's heading."""
    (_, *parts) = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))[client]


def requirements(client: str) -> list[str]:
    """What the section's first `pip install` installs."""
    line = re.search(r"^pip install (.+)$", section(client), re.MULTILINE)
    assert line is not None, client
    return shlex.split(line[1])


def block(client: str, language: str, number: int, changes: dict[str, str]) -> str:
    """A code block of the section, without `pip install`, with what is the reader's own replaced.

    Raises:
        AssertionError: the block lacks something that is to be replaced.
    """
    text = re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```", section(client), re.DOTALL | re.MULTILINE)[number]
    text = re.sub(r"^pip install .+\n", "", text, flags=re.MULTILINE)
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return str(text)
