"""The pictures of docs/page.md: `python -m tests.openai.page.pictures`. The demo model answers; Chromium takes them."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests import browsing, chromium
from tests.openai.conftest import Server
from tests.openai.page.acting import send

IMAGES = Path(__file__).parents[3] / "docs" / "images"
DEMO = {"id": "demo", "loader": "model_loaders.demo:load_model", "pinned": True}


def take(browser: Browser, url: str) -> None:
    """Both pictures."""
    expect.set_options(timeout=browsing.PATIENCE_MS)
    IMAGES.mkdir(exist_ok=True)
    page = browser.new_page(viewport={"width": 1240, "height": 900}, color_scheme="light")
    page.goto(url)
    for seed in (3, 4):
        send(page, "Tell me about the weather in Paris.", seed=str(seed), max_tokens="40")
        expect(page.get_by_role("listbox", name="Prompt tokens")).to_be_visible()
    tokens = page.get_by_role("listbox", name="Generated tokens").get_by_role("option")
    tokens.nth(tokens.count() // 2).hover()
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=IMAGES / "page-light.png")
    page.emulate_media(color_scheme="dark")
    for number, side in enumerate("AB"):
        choose_recorded(page, number, side)
    page.get_by_role("listbox", name="Generated tokens of B").locator(".differs").hover()
    page.screenshot(path=IMAGES / "page-dark.png", clip={"x": 0, "y": 0, "width": 1240, "height": 560})


def choose_recorded(page: Page, number: int, side: str) -> None:
    page.get_by_role("button", name="Requests").click()
    page.locator("tr[data-record] button").nth(number).click()
    page.get_by_role("button", name=f"Compare as {side}").click()
    expect(page.get_by_role("listbox", name=f"Prompt tokens of {side}")).to_be_visible()


def main() -> None:
    with TemporaryDirectory() as records, sync_playwright() as playwright:
        server = Server({"record_dir": records}, [DEMO])
        server.start()
        try:
            take(playwright.chromium.launch(executable_path=chromium.find(), args=["--no-sandbox"]), server.url)
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
