"""The official client over a real Ray Serve, checking every response against its types."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest
import requests
from openai import OpenAI


@pytest.fixture(scope="module")
def client(demo: str) -> OpenAI:
    return OpenAI(base_url=f"{demo}/v1", api_key="EMPTY", max_retries=0, _strict_response_validation=True)


CHAT = [{"role": "user", "content": "Repeat exactly: k7Qp2x"}]


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=CHAT, temperature=0, n=2)
    assert [choice.message.content for choice in answer.choices] == ["k7Qp2x", "k7Qp2x"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_is_the_same_text(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="gpt-3.5-turbo-0613", messages=CHAT, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "k7Qp2x"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["one", "two"], max_tokens=4, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    # OpenAI itself sends finish_reason null before the last chunk, which its client's strict mode does not take.
    lenient = OpenAI(base_url=client.base_url, api_key="EMPTY", max_retries=0)
    stream = lenient.completions.create(model="demo", prompt="one", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "gpt-3.5-turbo-0613"]
    assert client.models.retrieve("gpt-3.5-turbo-0613").id in ("demo", "gpt-3.5-turbo-0613")


@pytest.mark.parametrize(
    ("call", "kind", "code", "param"),
    [
        (
            lambda c: c.chat.completions.create(model="nope", messages=CHAT),
            openai.NotFoundError,
            "model_not_found",
            "model",
        ),
        (
            lambda c: c.chat.completions.create(model="demo", messages=CHAT, temperature=-1),
            openai.BadRequestError,
            "invalid_value",
            "temperature",
        ),
        (
            lambda c: c.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x" * 5000}]),
            openai.BadRequestError,
            "context_length_exceeded",
            "messages",
        ),
        (lambda c: c.models.retrieve("org/nope"), openai.NotFoundError, "model_not_found", "model"),
    ],
)
def test_errors_arrive_as_the_sdks_exceptions(
    client: OpenAI, call: Callable[[OpenAI], object], kind: type[openai.APIStatusError], code: str, param: str
) -> None:
    with pytest.raises(kind) as caught:
        call(client)
    error = caught.value
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert error.body["message"]  # type: ignore[index]


def test_context_overflow_has_the_wording_that_clients_know(demo: str) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "x" * 5000}]}
    message = requests.post(f"{demo}/v1/chat/completions", json=body, timeout=30).json()["error"]["message"]
    assert message.startswith("This model's maximum context length is 2048 tokens. However, your messages resulted in ")
    assert message.endswith(" tokens. Please reduce the length of the messages.")


@pytest.mark.parametrize("path", ["/nothing", "/v1/chat/completions", "/v1/chat/completions/more"])
def test_even_a_wrong_path_answers_in_openais_json(demo: str, path: str) -> None:
    error = requests.get(demo + path, timeout=30).json()["error"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/models", "/", "/nothing/v1/chat/completions"])
def test_a_path_outside_the_prefix_answers_in_openais_json(cluster: str, demo: str, path: str) -> None:
    answer = requests.get(cluster + path, timeout=30)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
    assert answer.json()["error"]["code"] == "route_not_found"
    assert path in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"]


def test_serves_own_paths_stay(cluster: str, demo: str) -> None:
    assert requests.get(f"{cluster}/-/healthz", timeout=30).text == "success"
    assert f"/{demo.rpartition('/')[2]}" in requests.get(f"{cluster}/-/routes", timeout=30).json()


@pytest.mark.parametrize("path", ["/v1//models", "/v1/models/", "//v1/models", ""])
def test_slashes_too_many_behind_serve(cluster: str, demo: str, path: str) -> None:
    prefix = demo.removeprefix(cluster)
    assert requests.get(f"{cluster}{prefix}{path}", timeout=30).status_code == 200
    assert requests.get(f"{cluster}/{prefix}{path}", timeout=30).status_code == 200
    assert requests.head(f"{cluster}{prefix}/health", timeout=30).status_code == 200


def test_ids_of_requests_behind_serve(demo: str) -> None:
    body = {"model": "demo", "prompt": "x", "max_tokens": 1}
    own = requests.post(f"{demo}/v1/completions", json=body, timeout=30)
    assert own.json()["id"] == f"cmpl-{own.headers['x-request-id']}"
    given = requests.post(f"{demo}/v1/completions", json=body, headers={"X-Request-Id": "mine"}, timeout=30)
    assert (given.json()["id"], given.headers["x-request-id"]) == ("cmpl-mine", "mine")
    field = requests.post(f"{demo}/v1/completions", json={**body, "request_id": "of-field"}, timeout=30)
    assert field.json()["id"] == "cmpl-of-field"


def test_strings_of_tokens_cross_from_the_replica(demo: str) -> None:
    body = {"model": "demo", "prompt": "ab", "return_token_strs": True}
    assert requests.post(f"{demo}/tokenize", json=body, timeout=30).json()["token_strs"] == ["a", "b"]


def check_one_request_id(url: str, headers: dict[str, str]) -> None:
    given = requests.get(f"{url}/v1/models", headers={**headers, "x-request-id": "abc"}, timeout=20)
    made = requests.get(f"{url}/v1/models", timeout=20)
    assert given.headers["x-request-id"] == "abc"
    assert made.headers["x-request-id"]
    assert "," not in made.headers["x-request-id"]


def test_a_response_has_one_request_id(demo: str) -> None:
    check_one_request_id(demo, {})
