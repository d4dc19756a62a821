"""The page of an application that Ray Serve runs under a prefix."""

from __future__ import annotations

import requests
from playwright.sync_api import expect

from tests.browsing import OpenPage, browser, faults, open_page

__all__ = ["browser", "faults", "open_page"]


def test_the_page_works_under_a_prefix(demo: str, open_page: OpenPage) -> None:
    for path in ("", "/", "/models/demo"):
        page = open_page(demo + path)
        expect(page.get_by_label("model", exact=True).locator("option")).to_have_text(["demo"])
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator(".block.is-content pre")).to_have_text("42")
    expect(page.get_by_role("listbox", name="Prompt tokens")).to_be_visible()
    page.get_by_role("button", name="Models").click()
    (replica,) = requests.get(f"{demo}/health?verbose", timeout=10).json()["data"]
    expect(page.locator('tr[data-model="demo"]')).to_contain_text(replica["replica"])
    docs = open_page(demo + "/docs")
    expect(docs.locator("#operations-chat-create_chat_completion")).to_be_visible()
