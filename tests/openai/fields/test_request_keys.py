"""The keys and numbers of requests: what is misspelt, unknown or out of range, at the top and inside objects."""

from __future__ import annotations

import json
import logging
from random import Random
from typing import Any

import pytest
import requests

from tests.openai.asking import CHAT, PATHS, post, refusal, sampled
from tests.openai.conftest import Server


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("maxTokens", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("max_token", "max_tokens"),
        ("top-p", "top_p"),
        ("sotp", "stop"),
        ("N", "n"),
        ("response_fromat", "response_format"),
        ("frequence_penalty", "frequency_penalty"),
        ("n_predit", "n_predict"),
        ("mirostatt", "mirostat"),
        ("tool", "tools"),
    ],
)
def test_misspelt_keys(server: Server, key: str, known: str) -> None:
    error = refusal(server, CHAT, **{key: 1})
    assert (error["param"], error["code"]) == (key, "unknown_parameter")
    assert f"did you mean '{known}'" in error["message"]


@pytest.mark.parametrize("name", ["temperature", "max_completion_tokens", "presence_penalty", "tool_choice"])
def test_every_slip_in_a_long_name_is_seen(server: Server, name: str) -> None:
    swapped = f"{name[:3]}{name[4]}{name[3]}{name[5:]}"
    for key in (f"{name[:4]}{name[5:]}", f"{name[:4]}q{name[4:]}", f"{name[:4]}q{name[5:]}", swapped):
        assert f"did you mean {name!r}" in refusal(server, CHAT, **{key: 1})["message"], key


@pytest.mark.parametrize("place", ["body", "message", "part", "options"])
def test_more_unknown_keys_than_anybody_means_are_refused(server: Server, place: str) -> None:
    """Each is compared with every known name: without a limit a small request would hold up the others."""
    random = Random(1)
    for count, status in ((90, 200), (3000, 400)):
        keys = {"".join(random.choices("bcdfghjkvwxz", k=14)): 1 for _ in range(count)}
        parts = [{"type": "text", "text": "hi", **(keys if place == "part" else {})}]
        message = {"role": "user", "content": parts, **(keys if place == "message" else {})}
        fields = keys if place == "body" else {"options": keys} if place == "options" else {}
        response = post(server, CHAT, **{"messages": [message], **fields})
        assert response.status_code == status, response.text[:300]
        if status == 400:
            assert response.json()["error"]["code"] == "unknown_parameter"


def test_unknown_keys_are_listed_and_logged_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    unknown = {
        "my_own_key": 1,
        "response_format": {"type": "text", "my_inner_key": 2},
        "options": {"my_option": 3},
        "gone": None,
    }
    with caplog.at_level(logging.WARNING, logger="deployments.openai.http.exchange"):
        first, second = (post(server, CHAT, **unknown) for _ in range(2))
    listed = {"my_own_key", "response_format.my_inner_key", "options.my_option"}
    for response in (first, second):
        assert response.status_code == 200
        assert set(response.headers["x-troupe-ignored"].split(",")) == listed
    for key in listed:
        assert len([record for record in caplog.records if repr(key) in record.getMessage()]) == 1


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("stream_options", {"include_usge": True}, "stream_options.include_usge"),
        ("structured_outputs", {"jsn": {}}, "structured_outputs.jsn"),
        ("structured_outputs", {"regex": "a", "disable_any_whitespace": True}, None),
        ("structured_outputs", {"regex": "a", "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern"),
        ("response_format", {"type": "text", "jsonschema": {}}, "response_format.jsonschema"),
    ],
)
def test_keys_inside_objects(server: Server, field: str, value: dict[str, Any], param: str | None) -> None:
    error = refusal(server, CHAT, **{field: value})
    assert error["param"] == (param or f"{field}.disable_any_whitespace")


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ({"frmat": {"type": "text"}}, "text.frmat"),
        ({"format": {"type": "json_schema", "name": "x", "shema": {}}}, "text.format.shema"),
    ],
)
def test_keys_inside_objects_of_a_response(server: Server, text: dict[str, Any], param: str) -> None:
    body = {"model": "org/scripted", "input": "hi", "text": text}
    response = requests.post(server.url + "/v1/responses", json=body, timeout=10)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_foreign_fields_of_a_response(server: Server) -> None:
    def ask(**fields: Any) -> requests.Response:
        return requests.post(
            server.url + "/v1/responses", json={"model": "org/scripted", "input": "abcdef", **fields}, timeout=10
        )

    cut = ask(n_predict=2)
    assert cut.json()["incomplete_details"] == {"reason": "max_output_tokens"}
    assert ask(max_tokens=2).json()["usage"] == cut.json()["usage"]
    assert json.loads(ask(do_sample=False).headers["x-troupe-sampling"])["temperature"] == 0
    both = ask(regex="a", text={"format": {"type": "json_object"}})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "regex")
    assert ask(mirostat=1).json()["error"]["param"] == "mirostat"
    # Errors name the field of the response, not that of the chat it becomes.
    without = ask(text={"format": {"type": "json_schema", "name": "x"}}).json()["error"]
    assert without["param"] == "text.format"
    assert "'text.format'" in without["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["temperature", "repetition_penalty", "top_p", "min_p", "typical_p", "typical"])
@pytest.mark.parametrize("value", [1e39, 1.7e308, 1e-46, 1e-300, "1e39", 10**400])
def test_numbers_that_float32_does_not_hold(server: Server, path: str, field: str, value: Any) -> None:
    assert refusal(server, path, **{field: value})["param"] == field


def test_small_and_large_numbers_that_float32_holds(server: Server) -> None:
    for value in (1.2e-38, 3.4e38, 0):
        assert sampled(server, CHAT, temperature=value).temperature == value


def test_seeds(server: Server) -> None:
    """-1 draws anew, as in vLLM and llama.cpp. Any other negative number is a seed, as in vLLM."""
    for seed, expected in ((-1, None), (-1.0, None), ("-1", None), (-2, -2), (0, 0), (-(2**63), -(2**63))):
        assert sampled(server, CHAT, seed=seed).seed == expected
    for seed in (2**63, -(2**63) - 1, 1.5, True, "x"):
        assert refusal(server, CHAT, seed=seed)["param"] == "seed"


OTHER_ROUTES: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/score", {"text_1": "a", "text_2": "b"}, "text_1"),
    ("/v1/score", {"queries": ["a"], "documents": ["b"]}, "queries"),
    ("/v1/score", {"prompt": "a", "choices": ["b"], "temperature": 0.5}, "temperature"),
    ("/v1/score", {"prompt": "a", "choises": ["b"]}, "choises"),
    ("/v1/embeddings", {"input": "a", "lora_path": "x"}, "lora_path"),
    ("/v1/embeddings", {"input": "a", "input_type": "query"}, "input_type"),
    ("/v1/embeddings", {"input": "a", "dimension": 1}, "dimension"),
    ("/v1/embeddings", {"input": "a", "truncate": "MIDDLE"}, "truncate"),
    ("/v1/embeddings", {"input": "a", "embd_normalize": 0}, "embd_normalize"),
    ("/v1/embeddings", {"input": "a", "prompt": "b"}, "prompt"),
    ("/tokenize", {"content": "a", "with_pieces": True}, "with_pieces"),
    ("/tokenize", {"prompt": "a", "add_special_token": True}, "add_special_token"),
    ("/detokenize", {"tokens": [1], "skip_special_tokens": True}, "skip_special_tokens"),
    ("/generate", {"prompt": "a", "mirostat": 1}, "mirostat"),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 3}}, "text"),
    ("/generate", {"prompt": "a", "num_return_sequences": 2}, "num_return_sequences"),
    ("/v1/decisions", {"input": "a", "question": []}, "question"),
]


@pytest.mark.parametrize(("path", "body", "param"), OTHER_ROUTES)
def test_other_routes(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    response = requests.post(server.url + path, json={"model": "org/scripted", **body}, timeout=10)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_what_other_routes_understand(server: Server) -> None:
    def ask(path: str, **body: Any) -> Any:
        response = requests.post(server.url + path, json={"model": "org/scripted", **body}, timeout=10)
        assert response.status_code == 200, response.text
        assert "x-troupe-ignored" not in response.headers
        return response.json()

    assert ask("/tokenize", content="ab", add_special=True)["tokens"] == [97, 98]
    assert ask("/v1/embeddings", content="ab") == ask("/v1/embeddings", input="ab", keep_alive="5m")
    assert ask("/generate", prompt="abcdef", max_new_tokens=3)["text"] == "abc"
    assert ask("/generate", prompt="abcdef", max_output_len=3, random_seed=-1)["text"] == "abc"
