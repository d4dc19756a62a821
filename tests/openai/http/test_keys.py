"""Who may call: API keys, and pages of other origins."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from deployments.config.api import ApiOptions
from deployments.core.errors import ConfigError
from deployments.openai.http.keys import ApiKeys
from tests.openai.conftest import Serve, Server

DIGEST = "sha256:" + hashlib.sha256(b"second-key").hexdigest()


@pytest.fixture(scope="module")
def guarded(serve: Serve) -> Server:
    return serve(api_keys=["first-key", DIGEST])


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_a_key_opens(guarded: Server, key: str) -> None:
    assert guarded.client(api_key=key).models.list().data


@pytest.mark.parametrize("key", ["first-ke", "first-key2", "FIRST-KEY", DIGEST, "x", "clé"])
def test_another_key_does_not(guarded: Server, key: str) -> None:
    response = requests.get(guarded.url + "/v1/models", headers={"Authorization": f"Bearer {key}".encode()}, timeout=5)
    assert response.status_code == 401


def test_the_error(guarded: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as error:
        guarded.client(api_key="no").models.list()
    assert error.value.code == "invalid_api_key"
    assert error.value.response.headers["www-authenticate"] == "Bearer"
    assert error.value.response.headers["x-request-id"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "bearer first-key"},
        {"Authorization": "Bearer  first-key "},
        {"api-key": "first-key"},
        {"x-api-key": "first-key", "Authorization": "Bearer "},
        {"Authorization": "Basic " + base64.b64encode(b"anyone:first-key").decode()},
        {"Authorization": "basic " + base64.b64encode(b":second-key").decode()},
    ],
)
def test_ways_to_send_a_key(guarded: Server, headers: dict[str, str]) -> None:
    assert requests.get(guarded.url + "/v1/models", headers=headers, timeout=5).status_code == 200


@pytest.mark.parametrize("token", ["", "!", "Zmlyc3Qta2V5", base64.b64encode(b"first-key:").decode(), "/w==", "Og=="])
def test_passwords_that_are_no_keys(guarded: Server, token: str) -> None:
    headers = {"Authorization": f"Basic {token}"}
    assert requests.get(guarded.url + "/v1/models", headers=headers, timeout=5).status_code == 401


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/docs/"])
def test_a_browser_asks_for_the_key_of_the_pages(guarded: Server, path: str) -> None:
    refused = requests.get(guarded.url + path, timeout=5)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Basic realm=")
    assert requests.get(guarded.url + path, auth=("", "first-key"), timeout=5).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/models/org/scripted"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/models/org/scripted/v1/completions"),
        ("POST", "/tokenize"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
        ("GET", "/models/../health"),
        ("GET", "/v1/models?path=/health"),
        ("OPTIONS", "/v1/models"),
    ],
)
def test_everything_is_guarded(guarded: Server, method: str, path: str) -> None:
    with requests.Session() as session:
        request = session.prepare_request(requests.Request(method, guarded.url))
        request.url = guarded.url + path
        request.headers["Host"] = "health"
        assert session.send(request, timeout=5).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/health/", "//health", "/v1//health//"])
def test_health_is_open(guarded: Server, path: str) -> None:
    assert requests.get(guarded.url + path, timeout=5).status_code == 200


def test_a_server_without_keys_takes_any(server: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer EMPTY"}):
        assert requests.get(server.url + "/v1/models", headers=headers, timeout=5).status_code == 200


def test_a_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nold-key\n\n")
    keys = ApiKeys(ApiOptions(api_keys_file=str(file)))
    opens(keys, "old-key")
    monkeypatch.setattr("deployments.openai.http.keys._RELOAD_SECONDS", 0.0)
    file.write_text("new-key\n")
    opens(keys, "new-key")
    refuses(keys, "old-key")
    refuses(keys, "# of the team")
    file.unlink()
    opens(keys, "new-key")
    file.write_text("\ufeffkey-of-an-editor\n")
    opens(keys, "key-of-an-editor")
    file.write_bytes(b"\xff\xfe")
    opens(keys, "key-of-an-editor")
    with pytest.raises(ConfigError, match="not a text in UTF-8"):
        ApiKeys(ApiOptions(api_keys_file=str(file)))
    file.write_text("")
    os.utime(file, (time.time(), time.time()))
    refuses(keys, "key-of-an-editor")
    refuses(keys, "")


@pytest.mark.parametrize("options", [{"api_keys": [""]}, {"api_keys": ["sha256:12"]}, {"api_keys_file": "/none/keys"}])
def test_keys_that_are_none(options: Any) -> None:
    with pytest.raises(ConfigError, match=r"API key|api_keys_file"):
        ApiKeys(ApiOptions(**options))


def opens(keys: ApiKeys, key: str) -> None:
    from starlette.datastructures import Headers

    keys.check(Headers({"authorization": f"Bearer {key}"}))


def refuses(keys: ApiKeys, key: str) -> None:
    from deployments.core.errors import Unauthorized

    with pytest.raises(Unauthorized):
        opens(keys, key)


PREFLIGHT = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}


def test_other_origins_are_closed_out(server: Server) -> None:
    response = requests.options(server.url + "/v1/chat/completions", headers=PREFLIGHT, timeout=5)
    assert "access-control-allow-origin" not in response.headers


def test_an_origin_may_be_let_in(serve: Serve) -> None:
    open_ = serve(cors_origins=["https://page.example"], api_keys=["k"])
    response = requests.options(open_.url + "/v1/chat/completions", headers=PREFLIGHT, timeout=5)
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    other = requests.options(open_.url + "/v1/models", headers={**PREFLIGHT, "Origin": "https://x.example"}, timeout=5)
    assert "access-control-allow-origin" not in other.headers
    refused = requests.get(open_.url + "/v1/models", headers={"Origin": "https://page.example"}, timeout=5)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"
