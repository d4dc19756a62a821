"""Every error is OpenAI's JSON, and none but a context overflow is one to AgentBench."""

from __future__ import annotations

import inspect
import json
import socket
from typing import Any

import openai
import pytest
import requests
from openai import OpenAI

from deployments.core import errors
from deployments.core.errors import ContextOverflow, TroupeError
from deployments.openai.http.errors import error_body, error_headers
from tests.openai.conftest import Server

MESSAGES: Any = [{"role": "user", "content": "hi"}]
CHAT = {"model": "org/scripted", "messages": MESSAGES}


def is_context_limit(body: str) -> bool:
    """AgentBench's rule, src/client/agents/http_agent.py of v0.2."""
    text = body.lower()
    return any(word in text for word in ("prompt", "context", "tokens")) and any(
        word in text for word in ("limit", "exceed", "max", "long", "much", "many", "reach", "over", "up", "beyond")
    )


def all_errors() -> list[type[TroupeError]]:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, TroupeError)]
    return [kind for kind in kinds if kind is not ContextOverflow]


TRAPS = [
    "max_tokens must be at least 1",
    "Prompt queue is full: too many TOKENS per minute",
    "CUDA out of memory. Context: prompt tokens … max_split_size",
    'limit \tokens \ttokens\nprompt\\context "tokens" Kontext \u212aontext to\u212aens',
]


@pytest.mark.parametrize("kind", all_errors())
@pytest.mark.parametrize("message", TRAPS)
def test_no_error_is_taken_for_a_context_overflow(kind: type[TroupeError], message: str) -> None:
    assert is_context_limit(message)
    error = kind(message, param="max_tokens")
    body = error_body(error).decode()
    assert not is_context_limit(body)
    assert json.loads(body) == {
        "error": {"message": message, "type": error.type, "param": "max_tokens", "code": error.code}
    }


def test_a_context_overflow_is_one() -> None:
    body = error_body(ContextOverflow(10, 12, param="messages")).decode()
    assert is_context_limit(body)
    assert '"code": "context_length_exceeded"' in body


def test_headers_say_whether_to_try_again() -> None:
    assert error_headers(errors.ModelError("x")) == {"x-should-retry": "false"}
    assert error_headers(errors.Overloaded("x", retry_after=0.2)) == {"retry-after": "1"}
    assert error_headers(errors.Unavailable("x")) == {}
    assert error_headers(errors.BadRequest("x")) == {}


def post(server: Server, path: str = "/v1/chat/completions", **kwargs: Any) -> Any:
    response = requests.post(server.url + path, timeout=20, **kwargs)
    assert response.headers["x-request-id"]
    if response.status_code != 200:
        assert response.headers["content-type"] == "application/json"
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        if error["code"] != "context_length_exceeded":
            assert not is_context_limit(response.text)
    return response


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"null", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"model": "org/scripted", "messages": [], "temperature": NaN}', "invalid_json"),
        (b'{"model": "org/scripted", "messages": [], "temperature": 1e999}', "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"a": "\\ud800"}', "invalid_json"),
        (b'{"\\ud800": 1}', "invalid_json"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "invalid_json"),
        (b'{"a": ' + b"[" * 100000, "invalid_json"),
        (b'{"a":' * 100000, "invalid_json"),
    ],
)
def test_bodies_that_are_no_json(server: Server, body: bytes, code: str) -> None:
    response = post(server, data=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == code


def test_an_emoji_written_as_a_surrogate_pair_is_text(server: Server) -> None:
    body = json.dumps({**CHAT, "messages": [{"role": "user", "content": "😀"}]})
    assert "\\ud83d" in body
    assert post(server, data=body, headers=JSON).json()["choices"][0]["message"]["content"] == "😀"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_other_content_types(server: Server, content_type: str) -> None:
    response = post(server, data=json.dumps(CHAT), headers={"Content-Type": content_type})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/vnd.api+json", None])
def test_content_types_of_json(server: Server, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert post(server, data=json.dumps(CHAT).encode(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "route_not_found"),
        ("GET", "/nothing/context/tokens/max", 404, "route_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/org/scripted", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
    ],
)
def test_paths(server: Server, method: str, path: str, status: int, code: str) -> None:
    response = requests.request(method, server.url + path, timeout=20)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert not is_context_limit(response.text)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 1e30}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 1000}}, "logit_bias.1"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": None}, "messages"),
        ({"stream_options": []}, "stream_options"),
        ({"model": 5}, "model"),
        ({"model": "none"}, "model"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"use_beam_search": 7}, "use_beam_search"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_fields(server: Server, fields: dict[str, Any], param: str) -> None:
    response = post(server, json={**CHAT, **fields})
    assert response.status_code == (404 if param == "model" and fields["model"] == "none" else 400)
    error = response.json()["error"]
    assert error["param"] == param
    assert param.partition("[")[0].partition(".")[0] in error["message"] or param == "model"


def test_a_model_must_be_named_where_there_are_several(server: Server) -> None:
    response = post(server, json={"messages": MESSAGES})
    assert response.status_code == 400
    assert "org/scripted" in response.json()["error"]["message"]


def test_nulls_are_absent(server: Server) -> None:
    nulls = dict.fromkeys(
        (
            "temperature",
            "top_p",
            "n",
            "stop",
            "seed",
            "max_tokens",
            "logit_bias",
            "stream",
            "stream_options",
            "logprobs",
        )
    )
    assert post(server, json={**CHAT, **nulls, "stream_options": {"include_usage": None}}).status_code == 200


SDK_ERRORS = [
    ("[fail out_of_memory]", 503, openai.InternalServerError, "out_of_memory", None),
    ("[fail model_error]", 500, openai.InternalServerError, "model_error", "false"),
    ("[fail unavailable]", 503, openai.InternalServerError, "unavailable", None),
]


@pytest.mark.parametrize(("content", "status", "kind", "code", "retry"), SDK_ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_of_the_model(
    client: OpenAI, content: str, status: int, kind: type[openai.APIStatusError], code: str, retry: str, stream: bool
) -> None:
    with pytest.raises(kind) as error:
        client.chat.completions.create(
            model="org/scripted", messages=[{"role": "user", "content": content}], stream=stream
        )
    assert error.value.status_code == status
    assert error.value.code == code
    assert error.value.message
    assert error.value.type == "server_error"
    assert error.value.response.headers.get("x-should-retry") == retry
    assert not is_context_limit(error.value.response.text)


def test_context_overflow(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="org/scripted", messages=[{"role": "user", "content": "x" * 3000}])
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "messages"
    assert "This model's maximum context length is 2000 tokens. However, your messages resulted in 302" in str(
        error.value
    )
    assert is_context_limit(error.value.response.text)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="org/scripted", prompt="x" * 3000)
    assert error.value.param == "prompt"


def test_template_failures_are_the_requests_fault(client: OpenAI) -> None:
    messages: Any = [{"role": "narrator", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match="Conversation roles must be") as error:
        client.chat.completions.create(model="org/scripted", messages=messages)
    assert error.value.code == "chat_template_error"


def test_request_ids(server: Server) -> None:
    given = requests.post(server.url + "/v1/x", headers={"X-Request-ID": "my-id.1"}, timeout=20)
    assert given.headers["x-request-id"] == "my-id.1"
    odd = requests.get(server.url + "/health", headers={"X-Request-ID": "a b;" + "c" * 500}, timeout=20)
    assert odd.headers["x-request-id"].startswith("req_")


def test_limits_name_themselves(serve: Any) -> None:
    small = serve(max_body_bytes=2000, max_header_bytes=2000)
    body = json.dumps({**CHAT, "padding": "x" * 3000}).encode()
    declared = post(small, data=body, headers=JSON)
    chunked = post(small, data=iter([body[:1000], body[1000:]]), headers=JSON)
    for response in (declared, chunked):
        assert response.status_code == 413
        assert "max_body_bytes" in response.json()["error"]["message"]
    headers = requests.get(small.url + "/v1/models", headers={"x-padding": "x" * 3000}, timeout=20)
    assert headers.status_code == 431
    assert "max_header_bytes" in headers.json()["error"]["message"]


def test_strict_parameters(serve: Any) -> None:
    strict = serve(strict_parameters=True)
    assert post(strict, json={**CHAT, "user": "me", "store": False}).status_code == 200
    for key in ("temprature", "my_field"):
        response = post(strict, json={**CHAT, key: 0})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == key
    inside = post(strict, json={**CHAT, "stream_options": {"my_field": 1}})
    assert (inside.status_code, inside.json()["error"]["param"]) == (400, "stream_options.my_field")


def test_a_request_that_is_no_http_does_not_hurt(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"\x00\x01 nonsense\r\n\r\n")
        connection.recv(1000)
    assert requests.get(server.url + "/health", timeout=20).json() == {"status": "ok"}
