"""Hooks of mkdocs (https://www.mkdocs.org/user-guide/configuration/#hooks) for the pages of this folder."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\.[^)#\s]*)[^)\s]*\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Show a link that leaves the folder as its text: the site has the pages, not the source they point to."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(link: re.Match[str]) -> str:
        leaves = posixpath.normpath(posixpath.join(folder, link[2])).startswith("..")
        return f"`{link[1]}`" if leaves else link[0]

    return LINK.sub(inside, markdown)
