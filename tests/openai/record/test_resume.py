"""A run that was killed goes on: what the record has is not computed again."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from deployments.core.calls import Call
from deployments.core.errors import ConfigError
from deployments.core.events import Event
from deployments.host.host import ModelHost
from deployments.local import make_app
from tests.openai.conftest import Serve, Server

ENGINE = {"pack_linears": False, "threads": 1}
TINY = {"id": "tiny", "loader": "tests.openai.tiny_models:load_model", "engine": ENGINE}
MESSAGES = [{"role": "user", "content": "Hi"}]
GREEDY = {"temperature": 0, "max_tokens": 5}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PREDICATE = {"type": "predicate", "instructions": "It is blue."}

computed: list[str] = []
"""The calls that models have computed."""


@pytest.fixture(scope="module", autouse=True)
def counting() -> Iterator[None]:
    plain = ModelHost.generate

    async def generate(self: ModelHost, call: Call) -> AsyncGenerator[Event, None]:
        computed.append(call.request_id)
        async for event in plain(self, call):
            yield event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelHost, "generate", generate)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def first(serve: Serve, folder: Path) -> Server:
    """The server of the run that is killed."""
    return serve([TINY], record_dir=str(folder), resume=True)


@pytest.fixture(scope="module")
def second(serve: Serve, folder: Path) -> Server:
    """The server of the run that is started again."""
    return serve([TINY], record_dir=str(folder), resume=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]


def post(server: Server, path: str, headers: dict[str, str] | None = None, **body: Any) -> requests.Response:
    return requests.post(server.url + path, json={"model": "tiny", **body}, headers=headers, timeout=30)


def recorded(server: Server, folder: Path, path: str, **body: Any) -> requests.Response:
    """An answer whose line is written."""
    before, begun = len(lines(folder)), time.monotonic()
    answer = post(server, path, **body)
    assert answer.status_code == 200, answer.text
    while len(lines(folder)) == before:
        assert time.monotonic() - begun < 10
        time.sleep(0.01)
    return answer


def same(answer: requests.Response) -> Any:
    """What is the same in two answers to one request; of a stream its text."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return {key: value for key, value in answer.json().items() if key not in ("id", "created", "created_at")}
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices), choices[-1]["finish_reason"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": MESSAGES, **GREEDY}),
        (CHAT, {"messages": MESSAGES, **GREEDY, "stream": True, "stop": ["a stream"]}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 5, "seed": 3, "n": 3, "stop": ["e"]}),
        (CHAT, {"messages": MESSAGES, **GREEDY, "logprobs": True, "top_logprobs": 3, "return_token_ids": True}),
        (TEXT, {"prompt": ["a", "bc"], **GREEDY, "logprobs": 2, "echo": True}),
        (TEXT, {"prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}),
        (TEXT, {"prompt": "a", **GREEDY, "prompt_logprobs": 1, "logit_bias": {"5": 1.5}}),
        ("/v1/responses", {"input": "Hello", "temperature": 0, "max_output_tokens": 5}),
        ("/v1/score", {"prompt": "a", "choices": ["b", "cd"]}),
        ("/v1/decisions", {"input": "The sky.", "questions": [PREDICATE]}),
    ],
)
def test_a_recorded_answer_is_given_again(
    first: Server, second: Server, folder: Path, path: str, body: dict[str, Any]
) -> None:
    whole = recorded(first, folder, path, **body)
    computed.clear()
    again = post(second, path, **body)
    assert computed == []
    assert again.status_code == 200, again.text
    assert whole.headers.get("x-troupe-resumed") is None
    line = requests.get(f"{second.url}/v1/records/{again.headers['x-troupe-resumed']}", timeout=5).json()
    assert line["path"] == path
    assert again.headers["x-troupe-fingerprint"] == whole.headers["x-troupe-fingerprint"] == line["fingerprint"]
    if path == "/v1/responses":
        assert again.json()["output"][0]["content"] == whole.json()["output"][0]["content"]
    else:
        assert same(again) == same(whole)


def test_a_stream_and_a_whole_answer_are_one_call(first: Server, second: Server, folder: Path) -> None:
    body = {"messages": [{"role": "user", "content": "as a stream?"}], **GREEDY}
    whole = recorded(first, folder, CHAT, **body)
    stream = post(second, CHAT, **body, stream=True)
    assert stream.headers["x-troupe-resumed"]
    assert same(stream)[0] == whole.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "Ho"}]},
        {"max_tokens": 6},
        {"temperature": 1},
        {"seed": 1, "temperature": 0.5},
        {"n": 2},
        {"logprobs": True},
    ],
)
def test_another_request_is_computed(first: Server, second: Server, folder: Path, change: dict[str, Any]) -> None:
    body = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0, "stop": [str(change)]}
    recorded(first, folder, CHAT, **body)
    assert post(second, CHAT, **body).headers["x-troupe-resumed"]
    assert "x-troupe-resumed" not in post(second, CHAT, **{**body, **change}).headers


def test_a_sampled_answer_without_a_seed_is_always_computed(first: Server, folder: Path) -> None:
    body = {"messages": MESSAGES, "max_tokens": 5, "temperature": 1}
    recorded(first, folder, CHAT, **body)
    assert "x-troupe-resumed" not in post(first, CHAT, **body).headers


def test_another_model_under_the_same_name_is_asked(serve: Serve, first: Server, folder: Path) -> None:
    body = {"messages": MESSAGES, "stop": ["weights"], **GREEDY}
    recorded(first, folder, CHAT, **body)
    other = serve([{**TINY, "engine": {**ENGINE, "max_batch_size": 3}}], record_dir=str(folder), resume=True)
    assert "x-troupe-resumed" not in post(other, CHAT, **body).headers


def test_the_header_decides(serve: Serve, first: Server, folder: Path) -> None:
    body = {"messages": MESSAGES, "stop": ["header"], **GREEDY}
    recorded(first, folder, CHAT, **body)
    assert "x-troupe-resumed" not in post(first, CHAT, {"x-troupe-resume": "false"}, **body).headers
    plain = serve([TINY], record_dir=str(folder))
    assert "x-troupe-resumed" not in post(plain, CHAT, **body).headers
    assert post(plain, CHAT, {"x-troupe-resume": "true"}, **body).headers["x-troupe-resumed"]
    wrong = post(plain, CHAT, {"x-troupe-resume": "yes please"}, **body)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-troupe-resume")


def test_a_server_without_a_record_says_so(serve: Serve) -> None:
    wrong = post(serve([TINY]), CHAT, {"x-troupe-resume": "true"}, messages=MESSAGES)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-troupe-resume")
    assert "record_dir" in wrong.json()["error"]["message"]
    with pytest.raises(ConfigError, match="record_dir"):
        make_app({"models": [TINY], "api": {"resume": True}})


def test_what_was_not_answered_is_computed(serve: Serve, tmp_path: Path) -> None:
    """A call that failed, was given up, or whose line is cut off by the kill."""
    server = serve(record_dir=str(tmp_path), resume=True)
    body = {"model": "org/scripted", "temperature": 0}
    assert post(server, TEXT, **body, prompt="[fail out_of_memory]").status_code == 503
    assert post(server, TEXT, **body, prompt="[fail out_of_memory]").status_code == 503
    recorded(server, tmp_path, TEXT, **body, prompt="abc")
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    file.write_bytes(whole.removesuffix(last) + last[: len(last) // 2])
    again = serve(record_dir=str(tmp_path), resume=True)
    answer = post(again, TEXT, **body, prompt="abc")
    assert "x-troupe-resumed" not in answer.headers
    assert answer.json()["choices"][0]["text"] == "abc"


def test_a_file_that_was_removed_is_not_missed(serve: Serve, tmp_path: Path) -> None:
    server = serve(record_dir=str(tmp_path), resume=True)
    body = {"model": "org/scripted", "temperature": 0, "prompt": "abc"}
    recorded(server, tmp_path, TEXT, **body)
    assert post(server, TEXT, **body).headers["x-troupe-resumed"]
    (file,) = tmp_path.glob("*.jsonl")
    file.unlink()
    answer = post(server, TEXT, **body)
    assert "x-troupe-resumed" not in answer.headers
    assert answer.json()["choices"][0]["text"] == "abc"
