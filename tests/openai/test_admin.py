"""The admin routes need a key and report the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests

from tests.openai.conftest import Serve, Server

KEY = {"Authorization": "Bearer k"}


@pytest.mark.parametrize(
    "options", [{}, {"api_keys": ["client"]}, {"admin_keys": ["k"]}, {"api_keys": ["client"], "admin_keys": ["k"]}]
)
@pytest.mark.parametrize("key", [None, "client", "wrong"])
def test_they_need_a_key_of_their_own(serve: Serve, options: dict[str, Any], key: str | None) -> None:
    address = serve(**options).url
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    answers = [requests.get(f"{address}/v1/admin/replicas", headers=headers, timeout=5)]
    answers += [
        requests.post(f"{address}/admin/{path}", json={}, headers=headers, timeout=5)
        for path in ("load", "unload", "drain")
    ]
    is_client = key == "client" and len(options) == 2
    expected = (403, "admin_key_required") if is_client else (401, "invalid_api_key")
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == expected


def test_an_admin_key_opens_the_whole_api(serve: Serve) -> None:
    url = serve(api_keys=["client"], admin_keys=["k"]).url
    assert requests.get(f"{url}/v1/models", headers=KEY, timeout=5).status_code == 200
    assert requests.get(f"{url}/v1/admin/replicas", headers=KEY, timeout=5).status_code == 200


def test_the_state_of_replicas_needs_a_key_if_the_api_does(server: Server, serve: Serve) -> None:
    assert "replicas" in requests.get(f"{server.url}/health?verbose", timeout=5).json()
    url = serve(api_keys=["k"]).url
    assert requests.get(f"{url}/health", timeout=5).json() == {"status": "ok"}
    assert requests.get(f"{url}/health?verbose", timeout=5).status_code == 401
    assert "replicas" in requests.get(f"{url}/health?verbose", headers=KEY, timeout=5).json()


def test_load_list_unload(serve: Serve) -> None:
    url = serve(admin_keys=["k"]).url

    def post(path: str) -> dict[str, object]:
        return dict(
            requests.post(f"{url}/v1/admin/{path}", json={"model": "org/scripted"}, headers=KEY, timeout=10).json()
        )

    assert post("load") == {"model": "org/scripted", "loaded": True}
    (replica,) = requests.get(f"{url}/v1/admin/replicas", headers=KEY, timeout=5).json()["data"]
    assert [model["id"] for model in replica["models"]] == ["org/scripted"]
    assert (replica["loads"], replica["evictions"]) == (1, 0)
    (line,) = requests.get(f"{url}/health?verbose", timeout=5).json()["replicas"]
    assert "org/scripted (scripted: 0 running, 0 waiting)" in line
    assert requests.get(f"{url}/health?verbose", timeout=5).json()["data"] == [replica]
    assert [post("unload"), post("unload")] == [
        {"model": "org/scripted", "unloaded": True},
        {"model": "org/scripted", "unloaded": False},
    ]


def test_a_load_that_failed_is_reported_until_one_succeeds(serve: Serve, tmp_path: Path) -> None:
    loader = tmp_path / "loader.py"
    loader.write_text("raise ValueError('no weights here')")
    server = serve([{"id": "m", "loader": f"{loader}:load_model", "load_retry_s": 0}], admin_keys=["k"])

    def failed() -> dict[str, str]:
        requests.post(f"{server.url}/admin/load", json={}, headers=KEY, timeout=10)
        (replica,) = requests.get(f"{server.url}/health?verbose", timeout=5).json()["data"]
        return dict(replica["failed"])

    assert "no weights here" in failed()["m"]
    loader.write_text("from tests.openai.scripted import load_model")
    assert failed() == {}


def test_drain_refuses_new_requests_until_it_is_over(serve: Serve) -> None:
    url = serve(admin_keys=["k"]).url
    body = {"model": "org/scripted", "messages": [{"role": "user", "content": "hi"}]}
    statuses = []
    for on in (True, False):
        requests.post(f"{url}/v1/admin/drain", json={"drain": on}, headers=KEY, timeout=5)
        answer = requests.post(f"{url}/v1/chat/completions", json=body, headers=KEY, timeout=10)
        statuses.append((answer.status_code, answer.headers.get("retry-after")))
    assert statuses == [(503, "5"), (200, None)]
