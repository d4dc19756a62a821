"""The operator's calls: behind a key, and true."""

from __future__ import annotations

import requests

from tests.openai.conftest import Serve, Server

KEY = {"Authorization": "Bearer k"}


def test_they_need_a_key(server: Server, serve: Serve) -> None:
    guarded = serve(api_keys=["k"])
    for address in (server.url, guarded.url):
        assert requests.get(f"{address}/v1/admin/replicas", timeout=5).status_code == 401
        for path in ("load", "unload", "drain"):
            answer = requests.post(f"{address}/admin/{path}", json={}, timeout=5)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_load_list_unload(serve: Serve) -> None:
    url = serve(api_keys=["k"]).url

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
    assert [post("unload"), post("unload")] == [
        {"model": "org/scripted", "unloaded": True},
        {"model": "org/scripted", "unloaded": False},
    ]


def test_drain_refuses_new_requests_until_it_is_over(serve: Serve) -> None:
    url = serve(api_keys=["k"]).url
    body = {"model": "org/scripted", "messages": [{"role": "user", "content": "hi"}]}
    statuses = []
    for on in (True, False):
        requests.post(f"{url}/v1/admin/drain", json={"drain": on}, headers=KEY, timeout=5)
        answer = requests.post(f"{url}/v1/chat/completions", json=body, headers=KEY, timeout=10)
        statuses.append((answer.status_code, answer.headers.get("retry-after")))
    assert statuses == [(503, "5"), (200, None)]
