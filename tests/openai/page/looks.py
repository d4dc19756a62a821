"""What can be measured of how a page looks and reads: names of controls, contrast of texts."""

from __future__ import annotations

from playwright.sync_api import Page

_NAMED = {
    "button", "link", "textbox", "combobox", "checkbox", "listbox", "option", "menuitem", "spinbutton", "searchbox",
    "DisclosureTriangle", "meter", "image", "form", "region", "navigation", "heading", "tab",
}  # fmt: skip


def unnamed_controls(page: Page) -> list[str]:
    """Roles in the accessibility tree that have no name, and fields whose only name is a placeholder."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    unnamed = []
    for node in nodes:
        role = node.get("role", {}).get("value", "")
        if node["ignored"] or role not in _NAMED:
            continue
        name = node.get("name", {})
        sources = [each for each in name.get("sources", []) if not each.get("superseded") and each.get("value")]
        if not name.get("value", "").strip() or [each["type"] for each in sources] == ["placeholder"]:
            unnamed.append(f"{role} {node.get('properties')}")
    return unnamed


def poor_contrasts(page: Page) -> list[str]:
    """Visible texts with a contrast below 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    found: list[str] = page.evaluate(_CONTRASTS)
    return found


_CONTRASTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((each) => each / 255)
    .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4))
    .reduce((sum, each, i) => sum + each * [0.2126, 0.7152, 0.0722][i], 0);
  const back = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = channels(getComputedStyle(each).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest(':disabled, noscript, option')) continue;
    const [a, b] = [light(channels(getComputedStyle(element).color)), light(back(element))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) poor.push(`${contrast.toFixed(2)}: ${element.outerHTML.slice(0, 120)}`);
  }
  return poor;
}"""
