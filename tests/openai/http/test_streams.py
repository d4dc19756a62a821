"""What every stream keeps to: lines, the last text before the reason to end, token counts."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import requests
from openai import OpenAI

from tests.openai.conftest import Serve, Server

MODEL = "org/scripted"
ROUTES: dict[str, Any] = {
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"prompt": text, "max_tokens": 100},
    "/v1/responses": lambda text: {"input": text},
    "/generate": lambda text: {"prompt": text, "max_output_len": 100},
}
WITH_REASON = ("/v1/chat/completions", "/v1/completions")


def events(server: Server, path: str, text: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, read by lines as httpx does: by all that Unicode calls a line end."""
    body = {"model": MODEL, "temperature": 0, "stream": True, **ROUTES[path](text), **fields}
    answer = requests.post(server.url + path, json=body, timeout=20)
    assert answer.status_code == 200
    lines = [line for line in answer.content.decode().splitlines() if line]
    assert all(line.startswith(("data: ", "event: ")) for line in lines), lines
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(line) for line in data if line != "[DONE]"]


def text_of(path: str, event: dict[str, Any]) -> str:
    if path == "/generate":
        return str(event["text"])
    if path == "/v1/responses":
        return str(event["delta"]) if event["type"] == "response.output_text.delta" else ""
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in event["choices"])


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "end", ["\u2028", "\u2029", "\x85", "\r\n", "\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "…", "é"]
)
def test_no_client_finds_a_line_end_within_an_event(server: Server, path: str, end: str) -> None:
    text = f"a{end}b{end}"
    assert "".join(text_of(path, event) for event in events(server, path, text)) == text


def test_requests_reads_the_same_lines(server: Server) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a\u2028b\u2029c\x85d"}], "stream": True}
    with requests.post(server.url + "/v1/chat/completions", json=body, stream=True, timeout=20) as answer:
        answer.encoding = "utf-8"
        lines = [line for line in answer.iter_lines(decode_unicode=True) if line]
    assert all(json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]")


def test_a_name_of_a_model_is_text_as_well(serve: Serve) -> None:
    odd = serve([{"id": "m\u2028x", "loader": "tests.openai.scripted:load_model"}])
    found = events(odd, "/v1/chat/completions", "a", model="m\u2028x")
    assert {event["model"] for event in found} == {"m\u2028x"}


@pytest.mark.parametrize("path", WITH_REASON)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 3},
        {"stop": "t"},
        {"n": 2},
        {"return_token_ids": True},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
)
def test_text_is_read_while_there_is_no_reason_to_end(server: Server, path: str, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, **ROUTES[path]("last text"), **fields}
    whole = requests.post(server.url + path, json={**body, "stream_options": None}, timeout=20).json()["choices"]
    texts = [""] * len(whole)
    ids: list[list[int]] = [[] for _ in whole]
    reasons: dict[int, str] = {}
    for event in events(server, path, "last text", **fields):
        for choice in event["choices"]:
            index = choice["index"]
            assert index not in reasons, "nothing follows the reason"
            if choice["finish_reason"] is None:
                texts[index] += text_of(path, {"choices": [choice]})
                ids[index] += choice.get("token_ids", [])
                continue
            reasons[index] = choice["finish_reason"]
            assert choice.get("delta", {}) == {}
            assert choice.get("text", "") == ""
            assert choice.get("token_ids", []) == []
            assert "stop_reason" in choice
    assert texts == [choice.get("text") or choice.get("message", {}).get("content") for choice in whole]
    assert reasons == {choice["index"]: choice["finish_reason"] for choice in whole}
    if "return_token_ids" in fields:
        assert ids == [choice["token_ids"] for choice in whole]


@pytest.mark.parametrize("path", WITH_REASON)
def test_log_probabilities_come_before_the_reason(server: Server, path: str) -> None:
    chat = path == "/v1/chat/completions"
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1}
    last = events(server, path, "ab", **fields)[-1]["choices"][0]
    assert last["finish_reason"] == "stop"
    assert not any(last["logprobs"].values())
    found = [c["logprobs"] for event in events(server, path, "ab", **fields) for c in event["choices"]]
    assert sum(len(each["content" if chat else "tokens"]) for each in found if each) == 3


def test_a_loop_that_ends_at_the_reason_has_the_whole_text(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "k7Qp2x"}]
    text = ""
    for chunk in client.chat.completions.create(model=MODEL, messages=messages, stream=True):
        if chunk.choices[0].finish_reason is not None:
            break
        text += chunk.choices[0].delta.content or ""
    assert text == "k7Qp2x"


@pytest.fixture(scope="module")
def counting(serve: Serve) -> Server:
    return serve(stream_usage=True)


@pytest.mark.parametrize("path", WITH_REASON)
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_a_server_may_report_usage_in_every_stream(counting: Server, path: str, options: Any) -> None:
    found = events(counting, path, "abc", stream_options=options)
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 4
    assert all(event["usage"] is None for event in found[:-1])


@pytest.mark.parametrize("path", WITH_REASON)
def test_a_server_that_reports_usage_does_so_in_every_chunk_if_asked(counting: Server, path: str) -> None:
    found = events(counting, path, "abc", stream_options={"continuous_usage_stats": True})
    assert all(event["usage"]["prompt_tokens"] for event in found)


@pytest.mark.parametrize("path", WITH_REASON)
def test_nobody_counts_unasked(server: Server, path: str) -> None:
    for options in (None, {}, {"continuous_usage_stats": True}, {"include_usage": False}):
        assert all("usage" not in event for event in events(server, path, "abc", stream_options=options))


OPTIONS = [{"include_usage": True}, {"include_usage": False}, {"continuous_usage_stats": True}, {"unheard_of": 1}]


@pytest.mark.parametrize("path", [path for path in ROUTES if path != "/generate"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_a_stream_without_a_stream(server: Server, path: str, options: dict[str, Any]) -> None:
    for stream in ({}, {"stream": False}, {"stream": None}):
        body = {"model": MODEL, **ROUTES[path]("abc"), "stream_options": options, **stream}
        answer = requests.post(server.url + path, json=body, timeout=20)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "stream_options"


def test_the_client_says_so_too(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match="does not stream"):
        client.chat.completions.create(model=MODEL, messages=messages, stream_options={"include_usage": True})


def test_defaults_of_a_model_may_name_options_of_streams(serve: Serve) -> None:
    defaults = {"default_params": {"stream_options": {"include_usage": True}}}
    server = serve([{"id": MODEL, "loader": "tests.openai.scripted:load_model", "api": defaults}])
    body = {"model": MODEL, **ROUTES["/v1/chat/completions"]("abc")}
    assert requests.post(server.url + "/v1/chat/completions", json=body, timeout=20).status_code == 200
    assert events(server, "/v1/chat/completions", "abc")[-1]["usage"]["completion_tokens"] == 4
