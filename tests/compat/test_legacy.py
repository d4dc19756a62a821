"""Routes of older servers, over the bundled demo model and the scripted one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests

from tests.openai.conftest import Serve, Server
from tests.openai.scripted import ENGINES

DEMO = {"id": "demo", "loader": "model_loaders.demo:load_model", "aliases": ["text-davinci-003", "org/alias"]}
REPEAT = "Repeat exactly: k7Qp2x"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
SEEN = {"role": "user", "content": [IMAGE]}
ASKED = {"type": "predicate", "instructions": "It is red."}


@pytest.fixture(scope="module")
def demo(serve: Serve) -> Server:
    return serve([DEMO])


def get(demo: Server, path: str) -> requests.Response:
    return requests.get(f"{demo.url}{path}", timeout=120)


def post(demo: Server, path: str, body: dict[str, Any], **options: Any) -> requests.Response:
    return requests.post(f"{demo.url}{path}", json=body, timeout=120, **options)


def assert_deprecated(answer: requests.Response, successor: str) -> None:
    assert answer.headers["deprecation"].startswith("@")
    assert answer.headers["link"] == f'</v1{successor}>; rel="successor-version"'


@pytest.mark.parametrize("prefix", ["/v1/engines", "/engines"])
def test_engines_are_models_and_aliases(demo: Server, prefix: str) -> None:
    answer = get(demo, prefix)
    assert_deprecated(answer, "/models")
    assert answer.json()["object"] == "list"
    assert [engine["id"] for engine in answer.json()["data"]] == ["demo", "text-davinci-003", "org/alias"]
    one = get(demo, f"{prefix}/org/alias")
    assert one.json() == {"id": "org/alias", "object": "engine", "owner": "troupe", "ready": True}
    assert get(demo, f"{prefix}/none").status_code == 404


@pytest.mark.parametrize("engine", ["demo", "text-davinci-003", "org/alias"])
def test_completions_of_an_engine_are_those_of_its_model(demo: Server, engine: str) -> None:
    body = {"prompt": "27 + 15 =", "max_tokens": 5, "temperature": 0}
    old = post(demo, f"/v1/engines/{engine}/completions", body)
    assert_deprecated(old, "/completions")
    new = post(demo, "/v1/completions", {"model": engine, **body})
    assert "deprecation" not in new.headers
    assert old.json()["choices"] == new.json()["choices"]


def test_embeddings_of_an_engine_are_those_of_its_model(demo: Server) -> None:
    old = post(demo, "/v1/engines/org/alias/embeddings", {"input": "27 + 15"})
    assert_deprecated(old, "/embeddings")
    assert old.json()["data"] == post(demo, "/v1/embeddings", {"model": "demo", "input": "27 + 15"}).json()["data"]


def test_an_unknown_engine_is_an_openai_error(demo: Server) -> None:
    answer = post(demo, "/v1/engines/gpt-2/completions", {"prompt": "a"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert_deprecated(answer, "/completions")


def test_the_chat_route_of_fastchat(demo: Server) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": REPEAT}], "temperature": 0}
    answer = post(demo, "/api/v1/chat/completions", body)
    assert answer.json()["choices"][0]["message"]["content"] == "k7Qp2x"
    assert_deprecated(answer, "/chat/completions")


def test_token_check(demo: Server) -> None:
    text = "Grüße"
    count = len(text.encode())  # the demo model has a token per byte
    limit = get(demo, "/v1/models/demo").json().get("max_model_len") or 2048
    prompts = [
        {"model": "demo", "prompt": text, "max_tokens": limit - count},
        {"model": "org/alias", "prompt": text, "max_tokens": limit - count + 1},
    ]
    answer = post(demo, "/api/v1/token_check", {"prompts": prompts})
    assert_deprecated(answer, "/tokenize")
    assert answer.json() == {
        "prompts": [
            {"fits": True, "tokenCount": count, "contextLength": limit},
            {"fits": False, "tokenCount": count, "contextLength": limit},
        ]
    }


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompts"),
        ({"prompts": ["a"]}, 400, "prompts"),
        ({"prompts": [{"model": "demo"}]}, 400, "prompt"),
        ({"prompts": [{"model": "none", "prompt": "a"}]}, 404, "model"),
    ],
)
def test_token_check_names_what_is_wrong(demo: Server, body: dict[str, Any], status: int, param: str) -> None:
    answer = post(demo, "/api/v1/token_check", body)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param


def test_generate(demo: Server) -> None:
    answer = post(demo, "/generate", {"prompt": REPEAT, "temperature": 0, "uuid": "mine", "top_k": -1})
    assert answer.json() == {"text": "k7Qp2x", "id": "mine"}
    assert_deprecated(answer, "/chat/completions")
    assert len(post(demo, "/generate", {"prompt": REPEAT}).json()["id"]) == 36


def test_generate_maps_its_sampling_fields(demo: Server) -> None:
    greedy = {"prompt": REPEAT, "temperature": 0}
    assert post(demo, "/generate", {**greedy, "max_output_len": 2}).json()["text"] == "k7"
    assert post(demo, "/generate", {**greedy, "stop_words": ["Q"]}).json()["text"] == "k7"
    assert post(demo, "/generate", {**greedy, "end_id": ord("p")}).json()["text"] in ("k7Q", "k7Qp")
    drawn = {"prompt": "Hello", "temperature": 3.0, "random_seed": 5}
    assert post(demo, "/generate", drawn).json()["text"] == post(demo, "/generate", drawn).json()["text"]


def test_a_length_penalty_is_for_the_backend(serve: Serve) -> None:
    """Triton, CTranslate2 and a loader's own generate take it; the engine that computes rows has no beams."""
    scripted = serve([{"id": "scripted", "loader": "tests.openai.scripted:load_model"}])
    assert post(scripted, "/generate", {"prompt": "abc", "len_penalty": 0.5, "uuid": "u"}).json()["id"] == "u"
    (sampling,) = [each.seen[-1].sampling for each in ENGINES if each.seen and each.seen[-1].sampling.extra]
    assert sampling.extra == {"length_penalty": 0.5}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/generate", {"prompt": "abc", "len_penalty": 0.5}, "len_penalty"),
        ("/generate", {"prompt": "abc", "len_penalty": 0.5, "stream": True}, "len_penalty"),
        ("/v1/responses", {"input": [SEEN]}, "input[0].content[0].image_url"),
        (
            "/v1/decisions",
            {"input": [SEEN], "questions": [ASKED]},
            "input[0].content[0].image_url",
        ),
    ],
)
def test_an_error_after_a_heartbeat_names_what_was_sent(
    serve: Serve, path: str, fields: dict[str, Any], param: str
) -> None:
    """Heartbeats are so frequent that the answer has begun before the error is known."""
    answer = post(serve([DEMO], heartbeat_seconds=1e-6), path, fields)
    assert answer.status_code == 200
    error = json.loads(answer.text[answer.text.index('{"error"') :].splitlines()[0])["error"]
    assert error["param"] == param


def test_generate_streams(demo: Server) -> None:
    answer = post(demo, "/generate", {"prompt": REPEAT, "temperature": 0, "stream": True, "uuid": "u"})
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event) for event in events[:-1]]
    assert "".join(piece["text"] for piece in pieces) == "k7Qp2x"
    assert {piece["id"] for piece in pieces} == {"u"}


def test_batch_generate(demo: Server) -> None:
    prompts = [REPEAT, "Repeat exactly: ab12cd", REPEAT]
    answer = post(demo, "/batch_generate", {"prompts": prompts, "temperature": 0, "uuid": "mine"})
    assert answer.json() == {"texts": ["k7Qp2x", "ab12cd", "k7Qp2x"], "id": "mine"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate", {}, "prompt"),
        ("/generate", {"prompts": ["a"]}, "prompt"),
        ("/generate", {"prompt": "a", "prompts": ["a"]}, "prompt"),
        ("/batch_generate", {"prompt": "a"}, "prompts"),
        ("/batch_generate", {"prompts": []}, "prompts"),
        ("/batch_generate", {"prompts": ["a"], "stream": True}, "stream"),
        ("/generate", {"prompt": "a", "len_penalty": 2}, "len_penalty"),
        ("/generate", {"prompt": "a", "len_penalty": 2, "stream": True}, "len_penalty"),
        ("/generate", {"prompt": "a", "n": 2}, "n"),
        ("/generate", {"prompt": "a", "top_p": 1.5}, "top_p"),
        ("/generate", {"prompt": "a", "image": "data:image/png;base64,AAAA"}, "messages[0].content[0].image_url"),
    ],
)
def test_what_generate_cannot_do_is_named(demo: Server, path: str, body: dict[str, Any], param: str) -> None:
    answer = post(demo, path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_timeout_is_kept(serve: Serve) -> None:
    slow = serve([{"id": "demo", "loader": "model_loaders.demo:load_model"}])
    body = {"prompt": "Count from 1 to 99", "timeout": 0.001, "max_output_len": 500, "temperature": 0}
    answer = post(slow, "/generate", body)
    assert answer.status_code == 503
    assert "timeout of 0.001 s" in answer.json()["error"]["message"]


def test_the_root_says_what_is_served(demo: Server) -> None:
    assert get(demo, "/").json()["models"] == ["demo"]


@pytest.mark.parametrize(
    ("method", "path", "successor", "names"),
    [
        ("POST", "/v1/edits", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/edits", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/load_lora_adapter", "/admin/models", "POST /admin/models"),
        ("POST", "/v1/unload_lora_adapter", "/admin/models", "POST /admin/models"),
    ],
)
def test_what_is_gone_says_what_has_replaced_it(
    demo: Server, method: str, path: str, successor: str, names: str
) -> None:
    answer = requests.request(method, demo.url + path, json={"input": "a", "instruction": "b"}, timeout=30)
    assert answer.status_code == 410
    assert_deprecated(answer, successor)
    assert answer.json()["error"]["code"] == "route_gone"
    assert names in answer.json()["error"]["message"]


def test_keys_are_asked_for_here_too(serve: Serve) -> None:
    locked = serve([DEMO], api_keys=["secret"])
    for path in ("/v1/engines", "/"):
        assert get(locked, path).status_code == 401
    body = {"prompt": REPEAT, "temperature": 0}
    assert post(locked, "/generate", body).status_code == 401
    assert post(locked, "/generate", body, headers={"Authorization": "Bearer secret"}).status_code == 200
