"""The list of models, and the paths under which everything answers."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import requests
from openai import OpenAI

from tests.openai.conftest import Serve, Server


def test_list(client: OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["org/scripted", "merging", "gpt-3.5-turbo-0613"]
    assert {model.object for model in models} == {"model"}
    assert all(isinstance(model.created, int) for model in models)


@pytest.mark.parametrize("name", ["org/scripted", "org%2Fscripted", "gpt-3.5-turbo-0613"])
def test_retrieve(server: Server, client: OpenAI, name: str) -> None:
    found = requests.get(f"{server.url}/v1/models/{name}", timeout=5).json()
    assert found["id"] == name.replace("%2F", "/")
    assert found["root"] == "org/scripted"
    assert client.models.retrieve(found["id"]).id == found["id"]


def test_limits_are_known_once_loaded(server: Server, client: OpenAI) -> None:
    client.completions.create(model="org/scripted", prompt="a")
    assert requests.get(server.url + "/v1/models/org/scripted", timeout=5).json()["max_model_len"] == 2000


def test_unknown(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("none")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("base", ["/v1", "", "/models/org/scripted/v1", "/models/gpt-3.5-turbo-0613"])
def test_every_base(server: Server, base: str) -> None:
    fields: dict[str, Any] = {} if base.startswith("/models") else {"model": "org/scripted"}
    chat = requests.post(
        f"{server.url}{base}/chat/completions",
        json={**fields, "messages": [{"role": "user", "content": "hi"}]},
        timeout=5,
    )
    assert chat.json()["choices"][0]["message"]["content"] == "hi"
    text = requests.post(f"{server.url}{base}/completions", json={**fields, "prompt": "hi"}, timeout=5)
    assert text.json()["choices"][0]["text"] == "hi"


def test_a_models_own_path(server: Server) -> None:
    client = server.client(base_url=f"{server.url}/models/org/scripted/v1")
    assert [model.id for model in client.models.list()] == ["org/scripted", "gpt-3.5-turbo-0613"]
    messages: Any = [{"role": "user", "content": "hi"}]
    assert client.chat.completions.create(model="anything", messages=messages).model == "anything"
    missing = requests.post(f"{server.url}/models/none/v1/completions", json={"prompt": "x"}, timeout=5)
    assert missing.json()["error"]["code"] == "model_not_found"


def test_a_default_model(serve: Serve) -> None:
    default = serve(default_model="merging")
    answer = requests.post(f"{default.url}/v1/completions", json={"prompt": "x"}, timeout=5)
    assert answer.json()["model"] == "merging"


def test_health(server: Server) -> None:
    for path in ("/health", "/v1/health"):
        assert requests.get(server.url + path, timeout=5).json() == {"status": "ok"}


def test_what_a_fingerprint_is_made_of(server: Server, client: OpenAI) -> None:
    answer = client.completions.create(model="org/scripted", prompt="a")
    found = requests.get(f"{server.url}/v1/fingerprint?model=gpt-3.5-turbo-0613", timeout=5)
    parts = found.json()
    assert (parts["model"], parts["fingerprint"]) == ("org/scripted", answer.system_fingerprint)
    assert found.headers["x-troupe-fingerprint"] == parts["fingerprint"]
    weights, setup = parts["weights"]["digest"][:12], parts["setup"]["digest"][:12]
    assert parts["fingerprint"] == f"troupe-w{weights}-s{setup}"
    assert {"loader", "kwargs", "engine", "api", "dtype", "device", "packages"} <= parts["setup"].keys()
    other = {"x-troupe-expect": "w" + "0" * 12}
    assert requests.get(f"{server.url}/models/org/scripted/fingerprint", headers=other, timeout=5).status_code == 409
