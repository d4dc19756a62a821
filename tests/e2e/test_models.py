"""Several models on one replica: swapped when asked for, a broken one harms only itself."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.serving import serving

LOADERS = """
import time
from tests.tiny import byte_tokenizer, llama

def load_model(seed):
    return {"model": llama(seed=seed), "tokenizer": byte_tokenizer()}

def broken():
    with open(__file__ + ".calls", "a") as calls:
        calls.write("x")
    raise RuntimeError("Traceback noise\\nthe weights are torn")

def hangs():
    time.sleep(3600)
"""


@pytest.fixture(scope="module")
def loaders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("loaders") / "tiny_loaders.py"
    file.write_text(LOADERS)
    return file


@pytest.fixture(scope="module")
def url(cluster: str, loaders: Path) -> Any:
    def model(name: str, function: str, **fields: Any) -> dict[str, Any]:
        return {"id": name, "loader": f"{loaders}:{function}", **fields}

    models = [
        model("a", "load_model", kwargs={"seed": 1}),
        model("org/b", "load_model", kwargs={"seed": 2}),
        model("broken", "broken"),
        model("hangs", "hangs", load_timeout_s=1),
    ]
    with serving(cluster, {"models": models, "max_models_per_replica": 1, "swap_patience_s": 0.2}) as address:
        yield address


def ask(url: str, model: str, **fields: Any) -> requests.Response:
    body = {"model": model, "temperature": 0, "max_tokens": 16, "messages": [{"role": "user", "content": "hi"}]}
    return requests.post(f"{url}/v1/chat/completions", json={**body, **fields}, timeout=60)


def text(response: requests.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_two_models_share_one_place(url: str) -> None:
    first = {model: text(ask(url, model)) for model in ("a", "org/b")}
    assert first["a"] != first["org/b"]
    for model in ("a", "org/b", "a"):
        assert text(ask(url, model)) == first[model]


def test_a_mixed_burst_is_answered_by_the_right_models(url: str) -> None:
    expected = {model: text(ask(url, model)) for model in ("a", "org/b")}
    got: list[tuple[str, str]] = []

    def worker(model: str) -> None:
        got.append((model, text(ask(url, model))))

    threads = [threading.Thread(target=worker, args=(model,)) for model in ("a", "org/b") * 12]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got
    assert all(answer == expected[model] for model, answer in got)
    assert len(got) == 24


def test_a_broken_loader_is_named_and_not_called_for_every_request(url: str, loaders: Path) -> None:
    for _ in range(3):
        response = ask(url, "broken")
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (500, "model_load_failed")
        assert "RuntimeError: the weights are torn" in error["message"]
        assert f"{loaders}:broken" in error["message"]
        assert response.headers["x-should-retry"] == "false"
    assert Path(f"{loaders}.calls").read_text() == "x"
    assert text(ask(url, "a"))


def test_a_hanging_loader_is_answered_in_time(url: str) -> None:
    started = time.monotonic()
    response = ask(url, "hangs")
    assert time.monotonic() - started < 10
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (504, "model_load_timeout")
    assert "tiny_loaders.py" in error["message"]
    assert text(ask(url, "a"))


def test_models_are_listed_whether_loaded_or_not(url: str) -> None:
    listed = requests.get(f"{url}/v1/models", timeout=10).json()["data"]
    assert [model["id"] for model in listed] == ["a", "org/b", "broken", "hangs"]
    assert requests.get(f"{url}/v1/models/org/b", timeout=10).json()["id"] == "org/b"
    assert requests.get(f"{url}/v1/models/org%2Fb", timeout=10).json()["id"] == "org/b"
