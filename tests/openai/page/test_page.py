"""The page at `/`: who gets it, its models, its playground, its key."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import requests
from playwright.sync_api import expect

from deployments.openai.page.page import POLICY, STATIC
from tests.browsing import OpenPage
from tests.openai.conftest import Serve, Server
from tests.openai.page.acting import choose, fact, send
from tests.openai.page.conftest import HOOKED, MODELS
from tests.openai.page.looks import poor_contrasts, unnamed_controls
from tests.openai.tiny_models import MARKUP

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def get(server: Server, path: str, accept: str = BROWSER, **headers: str) -> requests.Response:
    return requests.get(server.url + path, headers={"accept": accept, **headers}, timeout=5)


@pytest.mark.parametrize("path", ["/", "/models/org/scripted", "/models/org/scripted/", "//"])
def test_browsers_get_the_page_and_others_get_json(server: Server, path: str) -> None:
    page = get(server, path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"] == POLICY
    assert "<script" in page.text
    for accept in ("*/*", "application/json", "application/json, text/html;q=0.5", "text/html;q=0"):
        assert get(server, path, accept).headers["content-type"] == "application/json"
    assert get(server, "/").status_code == requests.head(server.url, headers={"accept": BROWSER}, timeout=5).status_code


@pytest.mark.parametrize("path", ["/v1/models", "/models/org/scripted/v1/models", "/models/org/scripted/models"])
def test_routes_stay_routes_for_browsers(server: Server, path: str) -> None:
    assert get(server, path).json()["object"] == "list"


def test_the_policy_allows_nothing_inside_the_documents() -> None:
    assert "unsafe" not in POLICY
    assert "default-src 'none'" in POLICY
    for document in STATIC.glob("*.html"):
        text = document.read_text()
        assert re.findall(r"<script(?![^>]* src=)|<style| on\w+=| style=", text) == []
        assert re.findall(r"(?:src|href)=\"(?!page/|\{\{base\}\})[^\"]*", text) == []


def test_the_files_need_no_key_and_nothing_else_is_served_without_one(serve: Serve) -> None:
    guarded = serve(api_keys=["k"])
    for path in ("/", "/models/anything", "/page/app.js", "/models/anything/page/app.js"):
        answer = get(guarded, path)
        assert (path, answer.status_code) == (path, 200)
        assert "scripted" not in answer.text
    for path in ("/page/none.js", "/page/../page.py", "/page/%2e%2e/page.py", "/page/", "/v1/models", "/openapi.json"):
        assert (path, get(guarded, path).status_code) == (path, 401)


def test_files_are_asked_for_again_only_if_they_changed(server: Server) -> None:
    first = get(server, "/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    assert get(server, "/page/app.js", **{"if-none-match": first.headers["etag"]}).status_code == 304


def test_every_file_of_ours_is_short_and_every_library_has_its_license() -> None:
    for file in (*STATIC.glob("*.js"), *STATIC.glob("*.html")):
        assert len(file.read_text().splitlines()) <= 300, file
    for library in (STATIC / "vendor").iterdir():
        assert any("LICENSE" in file.name for file in library.iterdir()), library


def test_the_figures_are_those_of_the_api(playing: Server, open_page: OpenPage) -> None:
    fields: dict[str, Any] = {"seed": 7, "max_tokens": 6, "temperature": 1, "logprobs": True, "top_logprobs": 5}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "return_token_ids": True, **fields}

    def ask() -> dict[str, Any]:
        return dict(requests.post(playing.url + "/v1/chat/completions", json=body, timeout=20).json())

    ask()  # The first prefill; the next two take its prefix, and have the same bits.
    page = open_page(playing.url)
    choose(page, "tiny")
    send(page, "hello", seed="7", max_tokens="6", temperature="1")
    answer = ask()
    (choice,) = answer["choices"]
    assert fact(page, "cached_tokens") == str(answer["usage"]["prompt_tokens_details"]["cached_tokens"]) != "0"
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert fact(page, name) == str(answer["usage"][name])
    assert (fact(page, "finish_reason"), fact(page, "seed")) == (choice["finish_reason"], "7")
    tokens = page.get_by_role("listbox", name="Generated tokens")
    assert tokens.get_by_role("option").count() == len(choice["token_ids"])
    detail = page.get_by_label("Generated tokens: chosen token")
    for i, (token_id, scored) in enumerate(zip(choice["token_ids"], choice["logprobs"]["content"], strict=True)):
        tokens.get_by_role("option").nth(i).hover()
        expect(detail).to_contain_text(f"id {token_id}")
        shown = detail.locator("tbody tr td:last-child").all_inner_texts()
        top = [each["logprob"] for each in scored["top_logprobs"]]
        expected = top if scored["logprob"] in top else [scored["logprob"], *top]
        assert list(map(float, shown)) == expected
    prompt = page.get_by_role("listbox", name="Prompt tokens").get_by_role("option")
    assert prompt.count() == len(answer["prompt_token_ids"])
    send(page, "again", max_tokens="3", ignore_eos="true")  # in place of the first answer
    expect(tokens.get_by_role("option")).to_have_count(3)


def test_the_prompt_before_it_is_sent(playing: Server, open_page: OpenPage) -> None:
    page = open_page(playing.url)
    choose(page, "tiny")
    page.get_by_role("button", name="Show prompt").click()
    tokens = page.get_by_role("listbox", name="Tokens of the prompt").get_by_role("option")
    expect(tokens.first).to_have_text("<|im_start|>")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What is 27 + 15?"}]}
    rendered = requests.post(playing.url + "/v1/chat/completions/render", json=body, timeout=20).json()
    assert tokens.count() == rendered["count"]


def test_stream_and_stop(playing: Server, open_page: OpenPage) -> None:
    page = open_page(playing.url)
    page.get_by_label("Text of message 1").fill("[wait 0.05]" + "abcdefgh" * 100)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator(".block.is-content pre")).to_contain_text("abc")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator('[data-fact="finish_reason"] dd')).to_have_text("stopped")


def test_the_keyboard_alone(playing: Server, open_page: OpenPage) -> None:
    page = open_page(playing.url)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    while page.evaluate("document.activeElement.ariaLabel") != "Text of message 1":
        page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("keys")
    page.keyboard.press("Control+Enter")
    tokens = page.get_by_role("listbox", name="Generated tokens")
    expect(tokens).to_be_visible()
    while page.evaluate("document.activeElement.ariaLabel") != "Generated tokens":
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("Generated tokens: chosen token")).to_contain_text('"e"')


def test_a_model_without_log_probabilities_and_with_markup_in_its_id_and_answers(
    playing: Server, open_page: OpenPage, faults: list[str]
) -> None:
    page = open_page(playing.url)
    choose(page, HOOKED)
    send(page, "hello")
    expect(page.locator(".block.is-content pre")).to_have_text(MARKUP)
    expect(page.get_by_role("listbox", name="Generated tokens").get_by_role("option")).to_have_count(len(MARKUP) + 1)
    expect(page.get_by_role("region", name="Generated tokens")).to_contain_text("or the model gives none")
    page.get_by_role("button", name="Models").click()
    expect(page.locator("table.models")).to_contain_text(HOOKED)
    assert page.evaluate("window.ran") is None
    page.get_by_role("button", name="Playground").click()
    send(page, "hello", logprobs="true")
    expect(page.get_by_role("region", name="Answer", exact=True)).to_contain_text("cannot honor logprobs")
    assert all("400 (Bad Request)" in fault for fault in faults)
    faults.clear()


def test_an_address_without_a_view_is_the_playground(playing: Server, open_page: OpenPage) -> None:
    page = open_page(f"{playing.url}/#toString")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def test_the_models(playing: Server, open_page: OpenPage) -> None:
    body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 2}
    for model in ("tiny", "broken"):
        requests.post(playing.url + "/v1/chat/completions", json={"model": model, **body}, timeout=20)
    page = open_page(playing.url + "/#models")
    row = page.locator('tr[data-model="tiny"]')
    expect(row).to_contain_text("loaded")
    (replica,) = requests.get(playing.url + "/health?verbose", timeout=5).json()["data"]
    (model,) = [each for each in replica["models"] if each["id"] == "tiny"]
    weights = f"{model['weight_bytes'] / 2**10:.0f} KiB"
    for name, shown in (("sequences", "0"), ("generated", str(model["generated_tokens"])), ("weights", weights)):
        assert row.locator(f'[data-figure="{name}"]').inner_text() == shown
    broken = page.locator('tr[data-model="broken"]')
    expect(broken).to_contain_text("failed")
    expect(broken).to_contain_text(replica["failed"]["broken"])
    assert "no_such_module" in replica["failed"]["broken"]


def test_it_asks_for_the_key(serve: Serve, open_page: OpenPage, faults: list[str]) -> None:
    page = open_page(serve(MODELS[:1], api_keys=["right"]).url)
    form = page.get_by_role("form", name="API key")
    for given, answer in (("ключ", "only letters, digits"), ("wrong", "Unknown API key"), ("right", None)):
        form.get_by_label("API key").fill(given)
        form.get_by_role("button", name="Use this key").click()
        if answer:
            expect(form).to_contain_text(answer)
    expect(form).to_be_hidden()
    send(page, "let me in")
    expect(page.locator(".block.is-content pre")).to_have_text("let me in")
    assert page.evaluate("[{...sessionStorage}, Object.keys(localStorage), document.cookie]") == [
        {"troupe-key": "right"}, ["troupe-theme"], "",
    ]  # fmt: skip
    assert faults
    assert all("401" in fault for fault in faults)
    faults.clear()


def test_every_control_has_a_name_and_every_text_a_contrast(playing: Server, open_page: OpenPage) -> None:
    page = open_page(playing.url)
    choose(page, "tiny")
    send(page, "hello", max_tokens="8", seed="1")
    expect(page.get_by_role("listbox", name="Prompt tokens")).to_be_visible()
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert unnamed_controls(page) == []
    for scheme, width in itertools.product(("light", "dark"), (1400, 320)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        assert poor_contrasts(page) == []
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    page.get_by_role("button", name="Models").click()
    expect(page.locator('tr[data-model="tiny"]')).to_contain_text("loaded")
    assert unnamed_controls(page) == []
    assert poor_contrasts(page) == []


def test_the_switch_of_the_theme(playing: Server, open_page: OpenPage) -> None:
    page = open_page(playing.url, color_scheme="light")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_label("Theme").select_option("dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark != light


def test_a_page_of_one_model(playing: Server, open_page: OpenPage) -> None:
    page = open_page(playing.url + "/models/tiny")
    expect(page.get_by_label("model", exact=True).locator("option")).to_have_text(["tiny"])
    send(page, "hello", max_tokens="2", ignore_eos="true")
    expect(page.locator('[data-fact="completion_tokens"] dd')).to_have_text("2")
    page.get_by_role("button", name="Models").click()
    expect(page.locator('tr[data-model="tiny"]')).to_contain_text("loaded")


def test_swagger_needs_no_internet(playing: Server, open_page: OpenPage, faults: list[str]) -> None:
    page = open_page(playing.url + "/docs/")
    page.locator("#operations-chat-create_chat_completion .opblock-summary-control").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table tbody .response-col_status")).to_contain_text("400")
    page.wait_for_load_state("networkidle")
    assert len(faults) == 1
    assert "400 (Bad Request)" in faults.pop()
