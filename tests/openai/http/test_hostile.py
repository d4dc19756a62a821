"""Requests that mean harm, or none at all: random bodies for every route, bombs, paths, escapes."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.openai.conftest import Serve, Server

CHAT = {"model": "org/scripted", "messages": [{"role": "user", "content": "hi"}]}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "org/scripted", "prompt": "hi"},
    "/v1/responses": {"model": "org/scripted", "input": "hi"},
    "/v1/embeddings": {"model": "org/scripted", "input": "hi"},
    "/tokenize": {"model": "org/scripted", "prompt": "hi"},
    "/detokenize": {"model": "org/scripted", "tokens": [65]},
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "user", "auto", "none", "json_object", "text", "hi", "\x00", "😀", "org/scripted"])
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def fields(server: Server) -> dict[str, list[str]]:
    """The fields of each route's body, as the server's own OpenAPI names them."""
    page = requests.get(server.url + "/openapi.json", timeout=20).json()
    found: dict[str, list[str]] = {}
    for path in BASES:
        schema = page["paths"][path if path in page["paths"] else f"/v1{path}"]["post"]["requestBody"]["content"][
            "application/json"
        ]["schema"]
        while "$ref" in schema:
            schema = page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        found[path] = sorted(schema["properties"])
    return found


def check(server: Server, path: str, body: dict[str, Any]) -> int:
    """Post a body; whatever the answer is, it is not a 5xx, and an error has OpenAI's shape."""
    body.pop("stream", None)
    answer = requests.post(server.url + path, data=json.dumps(body), timeout=60)
    assert answer.status_code in (200, 400, 404, 413), (path, body, answer.text[:500])
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] != "internal_error"
    return answer.status_code


def fuzz(server: Server, fields: dict[str, list[str]], path: str, examples: int) -> None:
    names = st.sampled_from(fields[path]) | st.text(max_size=10)

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(names, values, max_size=3), st.booleans())
    def run(changes: dict[str, Any], based: bool) -> None:
        check(server, path, ({**BASES[path]} if based else {}) | changes)

    run()


@pytest.mark.parametrize("path", BASES)
def test_no_body_is_a_fault_of_the_server(server: Server, fields: dict[str, list[str]], path: str) -> None:
    fuzz(server, fields, path, 40)


@pytest.mark.long
@pytest.mark.parametrize("path", BASES)
def test_no_body_of_a_thousand_is(server: Server, fields: dict[str, list[str]], path: str) -> None:
    fuzz(server, fields, path, 1000)


def test_a_hundred_megabytes_are_refused_before_they_come(server: Server) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {10**8}\r\n\r\n".encode())
        answer = connection.recv(4096)
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert time.monotonic() - began < 10


def test_a_compressed_body_is_not_unpacked(server: Server) -> None:
    bomb = gzip.compress(b" " * 10**8)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = requests.post(server.url + "/v1/chat/completions", data=bomb, headers=headers, timeout=20)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


PLACES = ["../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "a\x00b", "x" * 10_000]


@pytest.fixture(scope="module")
def opened() -> Iterator[list[str]]:
    """The files that are opened while the tests of this module run."""
    names: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open":
            names.append(str(arguments[0]))

    sys.addaudithook(watch)
    yield names
    watching = False


@pytest.mark.parametrize("name", PLACES)
def test_a_model_is_never_a_path(server: Server, opened: list[str], name: str) -> None:
    in_body = requests.post(server.url + "/v1/chat/completions", json={**CHAT, "model": name}, timeout=20)
    in_path = requests.get(f"{server.url}/v1/models/{quote(name, safe='')}", timeout=20)
    for answer in (in_body, in_path):
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["code"] in ("model_not_found", "route_not_found")
    assert not [file for file in opened if "passwd" in file or "x" * 100 in file]


def test_nothing_a_client_sends_breaks_a_log_line(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Line ends and terminal escapes in ids, users and headers."""
    evil = "a\r\nERROR fake \x1b[31mred"
    caplog.set_level(logging.DEBUG)
    answer = requests.post(
        server.url + "/v1/chat/completions", json={**CHAT, "model": evil, "user": evil, evil: 1}, timeout=20
    )
    assert answer.status_code == 404
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nx-request-id: a\x1b[31mb\r\n\r\n")
        head = connection.recv(4096)
    assert b"\x1b" not in head
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("deployments", "troupe", "model_loaders"))]
    assert not [line for line in ours if set(line) & {"\r", "\n", "\x1b"}]


def test_a_message_is_no_template(server: Server) -> None:
    content = "{{ 7 * 7 }}{% for i in range(10**9) %}x{% endfor %}"
    body = {**CHAT, "messages": [{"role": "user", "content": content}]}
    answer = requests.post(server.url + "/v1/chat/completions", json=body, timeout=20)
    assert answer.json()["choices"][0]["message"]["content"] == content


def test_a_body_that_stops_coming_is_given_up(serve: Serve) -> None:
    host, port = serve(body_timeout_s=0.2).url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"model": "org/scripted", '
        )
        answer = b""
        while b"}}" not in answer:
            more = client.recv(65536)
            assert more, answer
            answer += more
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"stopped after 26 bytes" in answer
