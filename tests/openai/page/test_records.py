"""Recorded calls: the routes that read them, the list and the comparison on the page."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import expect

from deployments.openai.page.record_files import RecordFolder, RecordQuery
from tests.browsing import OpenPage
from tests.openai.conftest import Serve, Server
from tests.openai.page.acting import choose, send
from tests.openai.page.conftest import MODELS

ADMIN = {"Authorization": "Bearer admin"}


def line(number: int, *, model: str = "m", hour: int = 10, text: str = "", **fields: Any) -> dict[str, Any]:
    """A call as the recorder writes it, which ended `number` seconds after the full hour."""
    return {
        "time": f"2026-01-01T{hour:02}:00:00.000+00:00",
        "id": f"chatcmpl-{number}",
        "model": model,
        "request_id": f"r{number}",
        "path": "/v1/chat/completions",
        "request": {"messages": [{"role": "user", "content": f"question {number}"}], **fields},
        "sampling": {"seed": 2**62 + 1},
        "prompts": [],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0, "reasoning_tokens": 0},
        "error": None,
        "choices": [{"index": 0, "text": text, "token_ids": [], "finish_reason": "stop", "stop_reason": None}],
        "seconds": {"accepted": 0.1, "first": 0.2, "finished": float(number)},
    }


def write(file: Path, *calls: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as written:
        for call in calls:
            written.write(json.dumps(call, ensure_ascii=False, separators=(",", ":")) + "\n")


def ids(calls: list[dict[str, Any]]) -> list[str]:
    return [call["request_id"] for call in calls]


def test_the_calls_of_several_files_are_in_order_and_in_pages(tmp_path: Path) -> None:
    for name, numbers in (("a", (1, 4, 5)), ("b", (2, 3, 6, 9)), ("c", (7, 8))):
        write(tmp_path / f"calls-{name}.jsonl", *map(line, numbers))
    folder = RecordFolder(tmp_path)
    expected = [f"r{number}" for number in range(9, 0, -1)]
    for limit in (1, 2, 4, 100):
        found: list[str] = []
        after: str | None = ""
        while after is not None:
            calls, after = folder.calls(RecordQuery(), limit, after)
            found += ids(calls)
        assert found == expected
    assert [json.loads(folder.line(call["record"]))["id"] for call in folder.calls(RecordQuery(), 2)[0]] == [
        "chatcmpl-9", "chatcmpl-8",
    ]  # fmt: skip


def test_old_files_are_not_opened_for_the_newest_calls(tmp_path: Path) -> None:
    old = tmp_path / "calls-old.jsonl"
    write(old, line(9))  # would be the newest if the file were opened: it was last written long before
    os.utime(old, (1, 1))
    write(tmp_path / "calls-new.jsonl", line(2), line(3))
    assert ids(RecordFolder(tmp_path).calls(RecordQuery(), 2)[0]) == ["r3", "r2"]


def test_a_line_that_is_being_written_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "calls-a.jsonl"
    write(file, line(1), line(2))
    with file.open("a") as written:
        written.write('{"not": "a call"}\nnot JSON\n\n{"time": "2026-01-01T10:00:00.000+00:00", "id"')
    (tmp_path / "other.jsonl").write_text(json.dumps(line(3)) + "\n")
    assert ids(RecordFolder(tmp_path).calls(RecordQuery(), 10)[0]) == ["r2", "r1"]


def test_a_long_line_is_listed_from_its_ends_and_given_as_it_is(tmp_path: Path) -> None:
    image = "x" * 3_000_000
    write(tmp_path / "calls-a.jsonl", line(1), line(2, image=image + "nèedle" + image), line(3))
    folder = RecordFolder(tmp_path)
    calls, _ = folder.calls(RecordQuery(), 10)
    assert ids(calls) == ["r3", "r2", "r1"]
    long = calls[1]
    assert (long["id"], long["seconds"]["finished"], long["bytes"] > 6_000_000) == ("chatcmpl-2", 2.0, True)
    assert json.loads(folder.line(long["record"])) == line(2, image=image + "nèedle" + image)
    assert ids(folder.calls(RecordQuery(text="nèedle"), 10)[0]) == ["r2"]


def test_the_filter(tmp_path: Path) -> None:
    calls = [line(1, model="a"), line(2, model="b", text='say "hi"'), line(3, model="b", text="é\n")]
    write(tmp_path / "calls-a.jsonl", *calls)
    folder = RecordFolder(tmp_path)
    assert ids(folder.calls(RecordQuery(model="b"), 10)[0]) == ["r3", "r2"]
    assert ids(folder.calls(RecordQuery(text='"hi"'), 10)[0]) == ["r2"]
    assert ids(folder.calls(RecordQuery(text="é\n"), 10)[0]) == ["r3"]
    assert ids(folder.calls(RecordQuery(model="a", text="question 1"), 10)[0]) == ["r1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def recording(serve: Serve, folder: Path) -> Server:
    return serve(MODELS[:3], record_dir=str(folder), admin_keys=["admin"])


def recorded(server: Server, **query: str) -> Any:
    answer = requests.get(f"{server.url}/v1/records", params=query, headers=ADMIN, timeout=10)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def ask(server: Server, content: str, count: int, **fields: Any) -> dict[str, Any]:
    """A chat, once it is in the record."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "seed": 1, **fields}
    headers = {"X-Request-ID": f"call-{count}"}
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=20).json()
    end = time.monotonic() + 10
    while not recorded(server, q=f"call-{count}"):
        assert time.monotonic() < end
        time.sleep(0.01)
    return dict(answer)


def test_who_may_read(recording: Server, serve: Serve, folder: Path) -> None:
    answer = ask(recording, "hello", 0)
    (call,) = recorded(recording, q="call-0")
    assert (call["id"], call["model"], call["finish_reasons"]) == (answer["id"], "tiny", ["length"])
    assert (call["asked"], call["usage"]["prompt_tokens"]) == ("hello", answer["usage"]["prompt_tokens"])
    url = f"{recording.url}/v1/records"
    for path in ("", f"/{call['record']}"):
        assert requests.get(url + path, headers=ADMIN, timeout=5).status_code == 200
        assert requests.get(url + path, timeout=5).status_code == 401
        assert requests.get(url + path, headers={"Authorization": "Bearer client"}, timeout=5).status_code == 401
    keyed = serve(api_keys=["client"], record_dir=str(folder)).url
    assert requests.get(f"{keyed}/records", timeout=5).status_code == 401
    assert requests.get(f"{keyed}/records", headers={"Authorization": "Bearer client"}, timeout=5).status_code == 200


def test_only_the_calls_of_the_folder(recording: Server, folder: Path) -> None:
    secret = folder.parent / "calls-secret.jsonl"
    write(secret, line(1))
    (folder / "calls-link.txt").symlink_to(secret)
    others = ("../calls-secret.jsonl:0", "..%2Fcalls-secret.jsonl:0", "calls-link.txt:0")
    for record in (*others, "calls-none.jsonl:0", "calls-none.jsonl", ":0"):
        answer = requests.get(f"{recording.url}/v1/records/{record}", headers=ADMIN, timeout=5)
        assert (record, answer.status_code, "question" in answer.text) == (record, 404, False)
    (call, *_) = recorded(recording)
    name, _, offset = call["record"].rpartition(":")
    for place in (int(offset) + 1, 10**18, 10**30):
        wrong = requests.get(f"{recording.url}/v1/records/{name}:{place}", headers=ADMIN, timeout=5)
        assert wrong.json()["error"]["code"] == "record_not_found"


@pytest.mark.parametrize(
    "query",
    [
        *("limit=0", "limit=201", "limit=" + "9" * 5000, "limit=x", "after=!", "after=e30x"),
        *("after=" + base64.b64encode(text).decode() for text in (b'["a"]', b"[" * 3000)),
    ],
)
def test_what_is_wrong_in_a_request_for_a_list(recording: Server, query: str) -> None:
    answer = requests.get(f"{recording.url}/v1/records?{query}", headers=ADMIN, timeout=5)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, query.partition("=")[0])


def test_a_server_that_records_nothing_says_how(playing: Server, open_page: OpenPage, faults: list[str]) -> None:
    page = open_page(playing.url + "/#requests")
    expect(page.get_by_role("status")).to_contain_text("set api.record_dir")
    assert len(faults) == 1
    assert "404" in faults.pop()


def test_the_list_and_the_first_differing_token(recording: Server, open_page: OpenPage) -> None:
    first, second = (ask(recording, "compare", i, seed=i, return_token_ids=True) for i in (1, 2))
    ids = [answer["choices"][0]["token_ids"] for answer in (first, second)]
    at = next(i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1])
    page = open_page(recording.url)
    page.evaluate("sessionStorage.setItem('troupe-key', 'admin')")
    for side, count in (("A", 1), ("B", 2)):
        page.get_by_role("button", name="Requests").click()
        page.get_by_label("contains").fill(f"call-{count}")
        page.get_by_role("button", name="Search").click()
        expect(page.locator("tr[data-record]")).to_have_count(1)
        page.locator("tr[data-record] button").click()
        expect(page.locator('[data-fact="x-request-id"] dd')).to_have_text(f"call-{count}")
        if side == "A":
            usage = first["usage"]
            assert page.locator('[data-fact="total_tokens"] dd').inner_text() == str(usage["total_tokens"])
            tokens = page.get_by_role("listbox", name="Generated tokens").get_by_role("option")
            expect(tokens).to_have_count(len(ids[0]))
        page.get_by_role("button", name=f"Compare as {side}").click()
    expect(page.get_by_role("status")).to_contain_text(f"The answers differ from token {at} of A")
    expect(page.get_by_role("status")).to_contain_text("The prompts are equal")
    for side, token_ids in zip("AB", ids, strict=True):
        marked = page.get_by_role("listbox", name=f"Generated tokens of {side}").locator(".differs")
        expect(marked).to_have_count(1)
        marked.hover()
        detail = page.get_by_label(f"Generated tokens of {side}: chosen token")
        expect(detail).to_contain_text(f"token {at} · id {token_ids[at]}")


def test_texts_of_a_record_are_texts(serve: Serve, tmp_path: Path, open_page: OpenPage, faults: list[str]) -> None:
    evil = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    call = line(1, model=evil, text=evil, user=evil)
    call |= {
        "id": evil,
        "request_id": evil,
        "path": f"/{evil}",
        "error": {"code": evil, "message": evil, "status": 500},
    }
    call["request"]["messages"][0]["content"] = evil
    call["prompts"] = [{"text": evil, "token_ids": [60]}]
    write(tmp_path / "calls-a.jsonl", call)
    page = open_page(serve(MODELS[:1], record_dir=str(tmp_path)).url + "/#requests")
    expect(page.locator("tr[data-record]")).to_contain_text(evil)
    page.locator("tr[data-record] button").click()
    expect(page.get_by_role("region", name="Recorded request")).to_contain_text(f"500 {evil}: {evil}")
    expect(page.locator(".read")).to_contain_text(evil)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert page.evaluate("[window.hacked, document.images.length, document.scripts.length]") == [None, 0, 1]
    expect(page.get_by_text("The tokens cannot be shown")).to_be_visible()  # there is no model of that name
    assert len(faults) == 1
    assert "404" in faults.pop()


def test_two_models_on_one_prompt(playing: Server, open_page: OpenPage) -> None:
    page = open_page(playing.url)
    choose(page, "tiny")
    send(page, "hello", max_tokens="4", temperature="0")
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("button", name="Take the playground's answer as A").click()
    page.get_by_label("Send the playground's request to a model, as B").select_option("org/scripted")
    expect(page.get_by_role("status")).to_contain_text("The models differ")
    expect(page.get_by_role("listbox", name="Prompt tokens of B").locator(".differs")).to_have_text("u")


def test_a_recorded_request_is_sent_again(recording: Server, open_page: OpenPage) -> None:
    ask(recording, "again", 3, seed=2**62 + 1, stop=["never"], logit_bias={"65": -1})
    page = open_page(recording.url)
    page.evaluate("sessionStorage.setItem('troupe-key', 'admin')")
    page.get_by_role("button", name="Requests").click()
    page.locator("tr[data-record] button").first.click()
    page.get_by_role("button", name="Open in the playground").click()
    expect(page.get_by_label("Text of message 1")).to_have_value("again")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Send", exact=True).click()
    body = json.loads(sent.value.post_data or "")
    assert (body["seed"], body["stop"], body["logit_bias"]) == (2**62 + 1, ["never"], {"65": -1})
    expect(page.locator('[data-fact="seed"] dd').first).to_have_text(str(2**62 + 1))
