"""Requests of tests to a model that answers from a script, and what became of them."""

from __future__ import annotations

from typing import Any

import requests

from deployments.core.calls import SamplingParams
from tests.openai import scripted
from tests.openai.conftest import Server

PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abcdef"}]},
    "/v1/completions": {"prompt": "abcdef"},
}
CHAT, COMPLETIONS = PATHS


def post(server: Server, path: str, **fields: Any) -> requests.Response:
    return requests.post(server.url + path, json={"model": "org/scripted", **PATHS[path], **fields}, timeout=10)


def refusal(server: Server, path: str, **fields: Any) -> dict[str, Any]:
    """The error that a request gets, which has to be a 400."""
    response = post(server, path, **fields)
    assert response.status_code == 400, (fields, response.text)
    error: dict[str, Any] = response.json()["error"]
    return error


def sampled(server: Server, path: str, **fields: Any) -> SamplingParams:
    """The parameters that reached the engine."""
    response = post(server, path, **fields)
    assert response.status_code == 200, (fields, response.text)
    assert "x-troupe-ignored" not in response.headers
    (engine,) = [e for e in scripted.ENGINES if e.seen and e.seen[-1].request_id.startswith(response.json()["id"])]
    return engine.seen[-1].sampling
