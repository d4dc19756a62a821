"""What a user does on the page."""

from __future__ import annotations

from playwright.sync_api import Page, expect


def send(page: Page, text: str, **fields: str) -> None:
    """Write a message and fields, and send them."""
    page.get_by_label("Text of message 1").fill(text)
    for name, value in fields.items():
        set_field(page, name, value)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.get_by_role("region", name="Answer", exact=True)).to_have_attribute("aria-busy", "false")


def set_field(page: Page, name: str, value: str) -> None:
    control = page.locator(f"#field-{name}")
    control.evaluate("control => { control.closest('details').open = true }")
    if control.evaluate("control => control.tagName") == "SELECT":
        control.select_option(value)
    else:
        control.fill(value)


def choose(page: Page, model: str) -> None:
    page.get_by_label("model", exact=True).select_option(model)


def fact(page: Page, name: str) -> str:
    return page.locator(f'[data-fact="{name}"] dd').first.inner_text()
