"""What the page shows of an answer: how it was read, images and tools of the request, copies of it, texts as texts."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import subprocess
from typing import Any

import pytest
import requests
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browsing import OpenPage
from tests.openai.conftest import Serve, Server
from tests.openai.page.acting import choose, send, set_field

EVIL = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def reading(serve: Serve) -> Server:
    """Models whose reasoning and tool calls are read, and one that sees images."""
    api = {"reasoning_parser": "think", "tool_parser": "hermes"}
    return serve(
        [
            {"id": "thinks", "loader": "tests.openai.scripted:load_model", "api": api},
            {"id": "sees", "loader": "tests.openai.tiny_models:with_images"},
        ]
    )


def tokens_read_as(page: Page, kind: str) -> str:
    return "".join(page.locator(f".tokens .is-{kind}").all_inner_texts())


def test_reasoning_and_tool_calls_as_they_were_read(reading: Server, open_page: OpenPage) -> None:
    page = open_page(reading.url)
    choose(page, "thinks")
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("Tools as JSON").fill(json.dumps([TOOL]))
    call = '{"name": "add", "arguments": {"a": 1}}'
    send(page, f"<think>é plan</think>well <tool_call>{call}</tool_call>")
    blocks = [page.locator(f".block.is-{kind} pre").inner_text() for kind in ("reasoning", "content", "call")]
    assert [block.strip() for block in blocks] == ["é plan", "well", 'add({"a": 1})']
    expect(page.get_by_role("listbox", name="Generated tokens")).to_be_visible()
    assert tokens_read_as(page, "reasoning") == "é plan"
    assert call in tokens_read_as(page, "call")
    assert "</think>" in tokens_read_as(page, "markup")
    page.get_by_text("Raw text, special tokens included").click()
    expect(page.locator("pre.raw:visible")).to_have_text(f"<think>é plan</think>well <tool_call>{call}</tool_call>")
    page.get_by_role("button", name="Continue the conversation").click()
    expect(page.get_by_label("Role of message 3")).to_have_value("tool")
    assert page.get_by_label("tool_call_id of message 3").input_value().startswith("call_")


def picture() -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(written, "PNG")
    return written.getvalue()


_DROP = """(encoded) => {
  const bytes = Uint8Array.from(atob(encoded), (each) => each.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], 'a.png', { type: 'image/png' }));
  const target = document.querySelector('.message textarea');
  target.dispatchEvent(new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }));
  return transfer;
}"""
_PASTE = _DROP.replace("new DragEvent('drop', { dataTransfer:", "new ClipboardEvent('paste', { clipboardData:")


def test_images_by_file_drop_and_paste(reading: Server, open_page: OpenPage) -> None:
    page = open_page(reading.url)
    choose(page, "sees")
    page.locator("input[type=file]").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    expect(page.locator(".parts img")).to_have_count(1)
    for count, way in ((2, _DROP), (3, _PASTE)):
        page.evaluate(way, base64.b64encode(picture()).decode())
        expect(page.locator(".parts img")).to_have_count(count)
    page.get_by_role("button", name="Remove image 3").click()
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "look", max_tokens="3", ignore_eos="true")
    parts = json.loads(sent.value.post_data or "")["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "image_url"]
    assert {part["image_url"]["url"] for part in parts[1:]} == {
        "data:image/png;base64," + base64.b64encode(picture()).decode()
    }
    expect(page.locator('[data-fact="completion_tokens"] dd')).to_have_text("3")


def test_texts_are_texts(reading: Server, open_page: OpenPage) -> None:
    page = open_page(reading.url)
    choose(page, "thinks")
    call = json.dumps({"name": EVIL, "arguments": {"a": EVIL}})
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("Tools as JSON").fill(json.dumps([TOOL]))
    send(page, f"<think>{EVIL}</think>{EVIL}<tool_call>{call}</tool_call>", request_id="r")
    expect(page.get_by_role("listbox", name="Generated tokens")).to_be_visible()
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert EVIL in page.locator(".block.is-content").inner_text()
    assert page.evaluate("[window.hacked, document.images.length, document.scripts.length]") == [None, 0, 1]


def test_every_field_can_be_set_and_only_what_is_set_is_sent(playing: Server, open_page: OpenPage) -> None:
    page = open_page(playing.url)
    expect(page.locator("#field-temperature")).to_be_visible()
    schemas = requests.get(playing.url + "/openapi.json", timeout=5).json()["components"]["schemas"]
    own = {"model", "messages", "prompt", "tools", "stream", "stream_options"}
    for kind, schema in (("chat", "ChatBody"), ("completion", "CompletionBody")):
        page.get_by_role("button", name=kind, exact=True).click()
        shown = page.locator("[id^=field-]:not([id$=-hint])").evaluate_all("all => all.map(each => each.name)")
        assert sorted(shown) == sorted(set(schemas[schema]["properties"]) - own)
    page.get_by_role("button", name="chat", exact=True).click()
    page.get_by_label("inspect tokens").uncheck()
    page.get_by_label("stream", exact=True).uncheck()
    values: dict[str, tuple[str, Any]] = {
        "temperature": ("0.5", 0.5), "seed": (str(2**62 + 1), 2**62 + 1), "stop": ("plain text", "plain text"),
        "ignore_eos": ("false", False), "logit_bias": ('{"65": -1}', {"65": -1}), "bad_words": ('["x"]', ["x"]),
        "reasoning_effort": ("low", "low"),
    }  # fmt: skip
    page.get_by_text("Further fields", exact=True).click()
    page.get_by_label("Further fields as JSON").fill('{"of_another_server": 1}')
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "abc", **{name: text for name, (text, _) in values.items()})
    messages = [{"role": "user", "content": "abc"}]
    expected = {"model": "org/scripted", "messages": messages, **{name: value for name, (_, value) in values.items()}}
    expected["of_another_server"] = 1
    assert json.loads(sent.value.post_data or "") == expected
    expect(page.get_by_text("Ignored by the server")).to_contain_text("of_another_server")
    set_field(page, "top_p", "a lot")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.get_by_role("alert")).to_have_text("top_p is not a number: a lot")


def test_several_prompts_and_choices(playing: Server, open_page: OpenPage) -> None:
    page = open_page(playing.url)
    page.get_by_role("button", name="completion", exact=True).click()
    page.get_by_label("Prompt", exact=True).fill('["ab", "cde"]')
    page.get_by_role("button", name="Send", exact=True).click()
    for choice, text in enumerate(("ab", "cde")):
        page.get_by_role("button", name=f"choice {choice}").click()
        expect(page.locator(".block.is-content pre")).to_have_text(text)
        expect(page.get_by_role("listbox", name="Prompt tokens").get_by_role("option")).to_have_text(list(text))


def test_the_copies_give_the_same_answer(playing: Server, open_page: OpenPage) -> None:
    page = open_page(playing.url)
    choose(page, "tiny")
    page.get_by_label("stream", exact=True).uncheck()
    send(page, 'it\'s "quoted"\n$HOME \\', seed="5", max_tokens="6", top_k="20")
    shown = page.locator(".block.is-content pre").inner_text()
    copies = {}
    for name in ("curl", "Python"):
        page.get_by_text(f"Copy as {name}").click()
        code = page.get_by_label(f"The request as {name}")
        expect(code).to_contain_text("top_k")
        copies[name] = code.inner_text()
    done = subprocess.run(["bash", "-c", copies["curl"]], capture_output=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == shown
    with contextlib.redirect_stdout(io.StringIO()):
        scope: dict[str, Any] = {}
        exec(copies["Python"], scope)
    assert scope["answer"].choices[0].message.content == shown


def test_what_was_read_is_found_in_the_raw_text(playing: Server, open_page: OpenPage) -> None:
    """`tokenKinds` alone: characters of several tokens, several texts between calls, unfinished bytes."""
    page = open_page(playing.url)
    read: list[list[str]] = page.evaluate(
        """async ([path, cases]) => {
          const { tokenKinds } = await import(path);
          return cases.map(([tokens, message]) => tokenKinds(tokens.map((bytes) => ({ bytes })), message));
        }""",
        [
            "/page/regions.js",
            [
                [
                    list(map(list, (b"<t>", b"\xf0\x9f", b"\x98\x80", b"</t>", b"ok"))),
                    {"reasoning": "😀", "content": "ok"},
                ],
                [list(map(list, (b"a ", b"[f", b"()]", b" b"))), {"content": "a  b", "calls": [{"name": "f"}]}],
                [list(map(list, (b"\xe2\x82", b"x"))), {"content": "\ufffdx"}],
                [[], {}],
            ],
        ],
    )
    assert read == [
        ["markup", "reasoning", "reasoning", "markup", "content"],
        ["content", "call", "call", "content"],
        ["content", "content"],
        [],
    ]
