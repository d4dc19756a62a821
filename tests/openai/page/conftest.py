"""Servers for the page, and a browser on them."""

from __future__ import annotations

import pytest

from tests.browsing import browser, faults, open_page
from tests.openai.conftest import Serve, Server

__all__ = ["browser", "faults", "open_page"]

TINY = "tests.openai.tiny_models"
ENGINE = {"pack_linears": False, "threads": 1}
HOOKED = "<img src=x onerror='window.ran = 3'>"
MODELS = [
    {"id": "org/scripted", "loader": "tests.openai.scripted:load_model", "aliases": ["gpt-3.5-turbo-0613"]},
    {"id": "tiny", "loader": f"{TINY}:load_model", "engine": ENGINE},
    {"id": "tools", "loader": f"{TINY}:with_tools", "engine": ENGINE},
    {"id": HOOKED, "loader": f"{TINY}:with_generate"},
    {"id": "broken", "loader": "tests.no_such_module:load"},
]


@pytest.fixture(scope="session")
def playing(serve: Serve) -> Server:
    """A server without keys and without a record."""
    return serve(MODELS)
