"""Where requests go: paths as clients write them, HEAD, names of requests, the version."""

from __future__ import annotations

import http.client
from typing import Any
from urllib.parse import quote

import pytest
import requests
from openai import OpenAI

from deployments.core.installed import server_version
from deployments.openai.http.paths import TidyPaths
from tests.openai.conftest import Serve, Server

SCRIPTED = "tests.openai.scripted:load_model"
CHAT: dict[str, Any] = {"model": "org/scripted", "messages": [{"role": "user", "content": "abc"}]}


def get(server: Server, path: str, method: str = "GET") -> tuple[int, bytes, Any]:
    """An answer to exactly this path, which `requests` would change."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


@pytest.mark.parametrize(
    "path",
    [
        "/v1//chat/completions",
        "//v1/chat/completions",
        "/v1/chat/completions/",
        "/v1/chat//completions//",
        "//chat/completions",
        "/models/org/scripted/v1//chat/completions",
        "/models/org/scripted//v1/chat/completions/",
        "/models//org/scripted/chat/completions",
        "/v1/engines/org/scripted//chat/completions",
        "/api/v1//chat/completions",
    ],
)
def test_slashes_too_many_of_a_request(server: Server, path: str) -> None:
    answer = requests.post(server.url + path, json=CHAT, timeout=10)
    assert answer.json()["choices"][0]["message"]["content"] == "abc"


@pytest.mark.parametrize(
    "path",
    ["/v1/models/", "//v1//models", "/models/", "/v1/models/org/scripted/", "/v1/models//org/scripted", "/docs/"],
)
def test_slashes_too_many_of_a_page(server: Server, path: str) -> None:
    assert get(server, path)[0] == 200


@pytest.mark.parametrize("base", ["/v1/", "/v1//", "//v1", "/models/org/scripted/v1/"])
def test_base_urls(server: Server, base: str) -> None:
    client = server.client(base_url=server.url + base)
    assert client.chat.completions.create(**CHAT).choices[0].message.content == "abc"


ODD = ["/data/models/x", "s3://bucket/y", "ends/", "a//b"]


@pytest.fixture(scope="module")
def odd(serve: Serve) -> Server:
    return serve([{"id": name, "loader": SCRIPTED} for name in ODD])


@pytest.mark.parametrize("name", ODD)
def test_slashes_of_a_models_name_are_kept(odd: Server, name: str) -> None:
    assert odd.client().models.retrieve(name).id == name
    for path in (f"/v1/models/{name}", f"/v1//models/{quote(name, safe='')}/", f"//models/{name}//v1//models"):
        status, body, _ = get(odd, path)
        assert status == 200, path
        assert name in body.decode()


def test_paths() -> None:
    plain = TidyPaths(["demo", "org/name"])
    paths = {"/": "/", "": "/", "///": "/", "/a": "/a", "/a/": "/a", "/a//b/": "/a/b", "/models//demo": "/models/demo"}
    assert {path: plain.path(path) for path in paths} == paths
    named = TidyPaths(["/x", "/x/y", "demo"])
    kept = {"/v1//models//x": "/v1/models//x", "/models//x/y//v1/": "/models//x/y/v1", "/models//xy": "/models/xy"}
    assert {path: named.path(path) for path in kept} == kept


GETS = ["/health", "/v1/health", "/v1/models", "/models/org/scripted", "/v1/version", "/docs", "/openapi.json", "/"]


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    status, body, headers = get(server, path, "HEAD")
    full = get(server, path)
    assert (status, body) == (200, b"")
    assert full[0] == 200
    assert headers["content-length"] == full[2]["content-length"] == str(len(full[1]))
    assert headers["content-type"] == full[2]["content-type"]


def test_head_of_what_is_not_there(server: Server) -> None:
    assert get(server, "/v1/models/none", "HEAD")[:2] == (404, b"")
    status, body, headers = get(server, "/v1/chat/completions", "HEAD")
    assert (status, body, headers["allow"]) == (405, b"", "POST")


def test_the_version(server: Server) -> None:
    for path in ("/version", "/v1/version"):
        assert requests.get(server.url + path, timeout=5).json() == {"version": server_version()}


@pytest.mark.parametrize("bias", [[], {}, [[97, -1]], [["97", -1], [98, 2.5]]])
def test_the_forms_of_logit_bias(server: Server, bias: Any) -> None:
    answer = requests.post(server.url + "/v1/chat/completions", json={**CHAT, "logit_bias": bias}, timeout=5)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "bias", [[1], [[97]], [[97, -1, 2]], [["word", 1]], [[97, False]], [[[1], 2]], [{}], "x", [[-1, 1]]]
)
def test_what_is_no_logit_bias(server: Server, bias: Any) -> None:
    answer = requests.post(server.url + "/v1/chat/completions", json={**CHAT, "logit_bias": bias}, timeout=5)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("logit_bias")


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/chat/completions": ("chatcmpl-", {"messages": CHAT["messages"]}),
    "/v1/completions": ("cmpl-", {"prompt": "abc"}),
    "/v1/responses": ("resp_", {"input": "abc"}),
}


def named(server: Server, path: str, header: str | None = None, **fields: Any) -> requests.Response:
    headers = {} if header is None else {"X-Request-Id": header}
    body = {"model": "org/scripted", **KINDS[path][1], **fields}
    return requests.post(server.url + path, json=body, headers=headers, timeout=10)


@pytest.mark.parametrize("path", KINDS)
def test_an_answer_has_the_id_of_its_request(server: Server, path: str) -> None:
    prefix = KINDS[path][0]
    for header, fields, expected in (
        ("from-header", {}, "from-header"),
        (None, {"request_id": "from:field/1"}, "from:field/1"),
        ("from-header", {"request_id": "from-field"}, "from-header"),
    ):
        answer = named(server, path, header, **fields)
        assert answer.json()["id"] == prefix + expected
        assert answer.headers["x-request-id"] == expected
    own = named(server, path)
    assert own.json()["id"] == prefix + own.headers["x-request-id"].removeprefix("req_")
    assert own.json()["id"] != named(server, path).json()["id"]


@pytest.mark.parametrize("path", KINDS)
def test_a_stream_has_it_in_every_event(server: Server, path: str) -> None:
    prefix = KINDS[path][0]
    answer = named(server, path, "mine", stream=True)
    assert answer.headers["x-request-id"] == "mine"
    assert f'"id":"{prefix}mine"' in answer.text


@pytest.mark.parametrize("wrong", ["", "a b", "x" * 129, "é", "a\n", 7, ["a"], "<script>"])
def test_ids_that_are_none(server: Server, wrong: Any) -> None:
    answer = named(server, "/v1/chat/completions", request_id=wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "request_id"


def test_one_id_may_be_used_by_requests_at_once(server: Server) -> None:
    slow = named(server, "/v1/chat/completions", "same", stream=True)
    answers = [slow, named(server, "/v1/chat/completions", "same"), named(server, "/v1/chat/completions", "same", n=3)]
    assert [answer.status_code for answer in answers] == [200, 200, 200]


def test_the_client_finds_its_id(client: OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, extra_headers={"X-Request-Id": "abc"})
    assert (answer.id, answer._request_id) == ("chatcmpl-abc", "abc")


@pytest.mark.parametrize(
    ("whose", "fields"),
    [
        ("vLLM", {"text_1": "a", "text_2": ["b"]}),
        ("vLLM", {"queries": "a", "documents": ["b"]}),
        ("vLLM", {"data_1": "a", "data_2": "b"}),
        ("SGLang", {"query": "a", "items": ["b"], "label_token_ids": [1, 2]}),
    ],
)
def test_the_score_of_another_server(server: Server, whose: str, fields: dict[str, Any]) -> None:
    answer = requests.post(server.url + "/v1/score", json={"model": "org/scripted", **fields}, timeout=5)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "unsupported_parameter")
    assert whose in error["message"]
    assert "'choices'" in error["message"]
    assert error["param"] in fields
