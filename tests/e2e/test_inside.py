"""Captured states under Ray Serve: each replica keeps its own files, and every ingress finds them."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from deployments.inside_client import load_capture, upload
from tests.e2e.test_added_models import until
from tests.faults.clients import KEY, replicas
from tests.tiny import llama

HEADERS = {"Authorization": f"Bearer {KEY}"}
CONFIG = llama().config


@pytest.fixture(scope="module")
def folder(two_ingresses: tuple[str, Path]) -> Path:
    """Where the replicas keep captured states."""
    return two_ingresses[1] / "captures"


@pytest.fixture(scope="module")
def url(two_ingresses: tuple[str, Path]) -> str:
    url, _ = two_ingresses
    until(lambda: healthy(url))
    return url


def healthy(url: str) -> bool:
    found = replicas(url)
    return len(found) == 2 and all("tiny" in {model["id"] for model in replica["models"]} for replica in found)


def complete(url: str, prompt: str, modules: list[str], **more: Any) -> dict[str, Any]:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": 5,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "capture": {"modules": modules, "positions": "all"},
        **more,
    }
    answer = requests.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def statuses(url: str, handle: dict[str, Any], method: str = "GET") -> set[int]:
    """What several requests for a file get: they reach both ingresses."""
    return {requests.request(method, url + handle["url"], headers=HEADERS, timeout=60).status_code for _ in range(6)}


def owner(folder: Path, handle: dict[str, Any]) -> Path:
    """The folder of the replica that has a file."""
    (file,) = folder.glob(f"*/{handle['id']}")
    return file.parent


def spread(url: str, folder: Path) -> dict[Path, dict[str, Any]]:
    """A file of each replica."""
    found: dict[Path, dict[str, Any]] = {}

    def both() -> bool:
        with ThreadPoolExecutor(8) as pool:
            for choice in pool.map(lambda number: complete(url, f"text {number}", ["model.norm"]), range(8)):
                found.setdefault(owner(folder, choice["capture"]), choice["capture"])
        return len(found) == 2

    until(both)
    return found


def test_every_file_is_found_and_is_that_of_its_answer(url: str, folder: Path) -> None:
    def same(number: int) -> Path:
        choice = complete(url, f"{number} " * (1 + number % 9), ["hidden_states"])
        capture = load_capture(url, choice["capture"], api_key=KEY)
        assert capture.token_ids.tolist() == [*choice["prompt_token_ids"], *choice["token_ids"]][:-1]
        assert capture["hidden_states.1"].shape == (len(capture.token_ids), CONFIG.hidden_size)
        return owner(folder, choice["capture"])

    with ThreadPoolExecutor(8) as pool:
        owners = set(pool.map(same, range(50)))
    assert len(owners) == 2
    listed = requests.get(f"{url}/v1/captures", headers=HEADERS, timeout=60).json()["data"]
    assert len(listed) == 50
    for handle in spread(url, folder).values():
        assert statuses(url, handle) == statuses(url, handle, "HEAD") == {200}
        assert requests.delete(url + handle["url"], headers=HEADERS, timeout=60).status_code == 204
        assert statuses(url, handle) == statuses(url, handle, "HEAD") == statuses(url, handle, "DELETE") == {404}


def test_a_large_file_arrives_whole(url: str) -> None:
    words = "a few words and " * 100
    choice = complete(url, words, ["**.self_attn:attention"])
    assert choice["capture"]["bytes"] >= 64 << 20
    weights = load_capture(url, choice["capture"], api_key=KEY)
    tokens = len(weights.token_ids)
    for layer in range(CONFIG.num_hidden_layers):
        found = weights[f"model.layers.{layer}.self_attn:attention"]
        assert found.shape == (tokens, CONFIG.num_attention_heads, tokens)
        assert abs(float(found.sum()) / (tokens * CONFIG.num_attention_heads) - 1) < 1e-4


def test_an_uploaded_vector_is_known_to_every_replica(url: str) -> None:
    vector = upload(url, [9.0] * CONFIG.hidden_size, api_key=KEY)
    change = {"module": "model.layers.0", "op": "set", "vector": vector}

    def state(number: int) -> float:
        choice = complete(url, "text", ["model.layers.0"], interventions=[change])
        return float(load_capture(url, choice["capture"], api_key=KEY)["model.layers.0"].mean())

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(state, range(16))) == {9.0}


def test_the_files_of_a_killed_replica_are_gone(url: str, folder: Path) -> None:
    first, second = spread(url, folder).items()
    pids = {replica["pid"] for replica in replicas(url)}
    (killed,) = [pid for pid in pids if first[0].name.startswith(f"troupe-captures-{pid}-")]
    os.kill(killed, signal.SIGKILL)
    answer = requests.get(url + first[1]["url"], headers=HEADERS, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "capture_not_found")
    assert statuses(url, first[1]) == statuses(url, first[1], "HEAD") == statuses(url, first[1], "DELETE") == {404}
    assert statuses(url, second[1]) == {200}
    until(lambda: healthy(url) and killed not in {replica["pid"] for replica in replicas(url)})
    # The replica in its place has removed them when it started.
    assert not first[0].exists()
    assert second[0].exists()
    assert complete(url, "text", ["model.norm"])["capture"]["bytes"] > 0
