"""Servers that are about to be hurt, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

Say = Callable[[str], None]


@pytest.fixture
def say(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Say]:
    """Print the figure of a test, also where pytest captures output, and keep it in the report."""
    lines: list[str] = []
    yield lines.append
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for line in lines:
            print(f"\n  {request.node.name}: {line}", end="", flush=True)
            record_property("figure", line)
