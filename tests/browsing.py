"""A real browser on the page, which notes everything that the page must not do: fixtures for a module's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from tests import chromium

OpenPage = Callable[..., Page]

PATIENCE_MS = 30_000
"""How long a test waits for what must come: a model may load first, beside other tests."""
expect.set_options(timeout=PATIENCE_MS)


# Of a module: Playwright's event loop runs in this thread, where other tests start loops of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium.find()
    if path is None:
        pytest.skip(chromium.MISSING)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def faults() -> list[str]:
    """What went wrong in the browser; a test removes what it expects."""
    return []


@pytest.fixture
def open_page(browser: Browser, faults: list[str]) -> Iterator[OpenPage]:
    """Opens an address; keyword arguments are those of a browser context.

    No request may leave the origin of the address, and no error may be in the console, where Chromium also reports what
    the Content-Security-Policy refuses.
    """
    contexts = []

    def open_page(url: str, **options: Any) -> Page:
        origin = urlsplit(url)[:2]

        def stays(request: Request) -> None:
            if urlsplit(request.url)[:2] != origin and not request.url.startswith("data:"):
                faults.append(f"a request to {request.url}")

        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", stays)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []
