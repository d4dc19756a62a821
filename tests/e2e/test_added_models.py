"""Models that come while the server runs, with two ingresses; ingresses, registry and replicas are killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from ray.exceptions import RayError

from deployments.ingress import OpenAIIngress
from tests.adapters.lora import write_adapter
from tests.faults.processes import INGRESS, REPLICA, pids
from tests.serving import serving
from tests.tiny import byte_tokenizer, llama

ADMIN = {"Authorization": "Bearer admin"}
REGISTRY = "#ModelRegistry#"


def write(folder: Path, seed: int) -> Path:
    llama(seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def args(place: Path) -> dict[str, Any]:
    engine = {"pack_linears": False, "threads": 1}
    kwargs = {"model_name": str(place / "base")}
    base = {"id": "base", "loader": "model_loaders.auto:load_model", "kwargs": kwargs, "engine": engine}
    return {
        "models": [base],
        "folders": [{"glob": str(place / "run" / "*"), "like": "base", "every_s": 0.2}],
        "settle_s": 0.1,
        "state_dir": str(place / "state"),
        "max_models_per_replica": 4,
        "api": {"admin_keys": ["admin"], "admin_roots": [str(place / "allowed")]},
    }


def write_all(place: Path) -> None:
    """The base, and what is added to it."""
    write(place / "base", 0)
    write(place / "allowed" / "mine", 1)
    write_adapter(llama(), place / "allowed" / "poet", ["q_proj", "v_proj"], seed=1)


def complete(url: str, model: str, **headers: str) -> requests.Response:
    body = {"model": model, "prompt": "ab", "max_tokens": 4, "temperature": 0}
    return requests.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)


def fingerprint(url: str, model: str) -> str:
    answer = complete(url, model)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-troupe-fingerprint"]


def add(url: str, place: Path, name: str) -> requests.Response:
    body = {"id": name, "like": "base", "model_name": str(place / "allowed" / "mine")}
    return requests.post(f"{url}/admin/models", json=body, headers=ADMIN, timeout=60)


def replace(url: str, place: Path, name: str, **fields: Any) -> requests.Response:
    body = {"id": name, "like": "base", "model_name": str(place / "allowed" / "mine"), "aliases": ["other"]}
    return requests.post(f"{url}/admin/models", json={**body, "replace": True, **fields}, headers=ADMIN, timeout=60)


def add_adapter(url: str, place: Path) -> requests.Response:
    body = {"id": "poet", "base": "base", "adapter": str(place / "allowed" / "poet")}
    return requests.post(f"{url}/admin/models", json=body, headers=ADMIN, timeout=60)


def statuses(url: str, name: str, count: int) -> set[int]:
    """Of many requests at once for what is known of a model; they go to both ingresses."""
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: requests.get(f"{url}/v1/models/{name}", timeout=30), range(count))
        return {answer.status_code for answer in answers}


def until(check: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextlib.contextmanager
def stopped(kind: str) -> Iterator[None]:
    """The only process of a kind does nothing until the block ends."""
    (pid,) = pids(kind)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def kill(kind: str) -> None:
    """End all processes of a kind, and wait until there are as many new ones."""
    before = pids(kind)
    for pid in before:
        os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        with contextlib.suppress(RayError, ValueError):  # One of the actors is just about to be dead.
            found = pids(kind)
            return len(found) == len(before) and not set(found) & set(before)
        return False

    until(replaced)


def test_every_ingress_knows_a_model_at_once_and_follows_its_versions(two_ingresses: tuple[str, Path]) -> None:
    url, place = two_ingresses
    assert complete(url, "mine").status_code == 404
    assert add(url, place, "mine").status_code == 201
    assert add_adapter(url, place).status_code == 201
    assert statuses(url, "mine", 100) | statuses(url, "poet", 100) == {200}
    poet = fingerprint(url, "poet")
    assert replace(url, place, "mine", load=True).status_code == 201
    write_adapter(llama(hidden_size=64), place / "allowed" / "wrong", ["q_proj", "v_proj"], seed=1)
    wrong = {"id": "poet", "base": "base", "adapter": str(place / "allowed" / "wrong"), "replace": True}
    refused = requests.post(f"{url}/admin/models", json=wrong, headers=ADMIN, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "adapter"), refused.text
    assert fingerprint(url, "poet") == poet
    old = fingerprint(url, "mine")
    write(place / "allowed" / "mine", 2)
    until(lambda: fingerprint(url, "mine") != old)
    refused = complete(url, "mine", **{"x-troupe-expect": old})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "version_mismatch")
    listed = requests.get(f"{url}/v1/models", timeout=10).json()["data"]
    parents = {model["id"]: model["parent"] for model in listed}
    assert parents == {"base": None, "tiny": None, "mine": None, "other": None, "poet": "base"}
    write_adapter(llama(), place / "allowed" / "poet", ["q_proj", "v_proj"], seed=2)
    until(lambda: fingerprint(url, "poet") != poet)
    assert requests.delete(f"{url}/admin/models/mine", headers=ADMIN, timeout=60).json()["deleted"] is True
    until(lambda: statuses(url, "mine", 20) == {404})


@pytest.mark.long
def test_a_registry_that_does_not_answer(cluster: str, tmp_path: Path) -> None:
    """What is known is served; what is not may be a model of another ingress, which is not a 404."""
    place = tmp_path
    write_all(place)
    with serving(cluster, args(place)) as url:
        assert add(url, place, "mine").status_code == 201
        assert complete(url, "mine").status_code == 200
        with stopped(REGISTRY):
            assert complete(url, "mine").status_code == 200
            for name in ("nobody", "base:poet"):
                away = complete(url, name)
                assert (away.status_code, away.json()["error"]["code"]) == (503, "unavailable"), away.text
                assert away.headers["retry-after"]
        until(lambda: complete(url, "nobody").status_code == 404)
        assert add_adapter(url, place).status_code == 201
        assert complete(url, "base:poet").status_code == 200


@pytest.mark.long
def test_nobodys_death_loses_a_model(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path
    write_all(place)
    monkeypatch.setattr("deployments.app.OpenAIIngress", OpenAIIngress.options(num_replicas=2))
    with serving(cluster, args(place)) as url:
        assert add(url, place, "mine").status_code == 201
        assert add_adapter(url, place).status_code == 201
        assert statuses(url, "mine", 1000) | statuses(url, "poet", 1000) == {200}
        weights, adapted = fingerprint(url, "mine"), fingerprint(url, "poet")
        shutil.copytree(place / "allowed" / "mine", place / "run" / "checkpoint-1")
        until(lambda: complete(url, "checkpoint-1").status_code == 200)
        for kind in (REPLICA, REGISTRY, INGRESS):
            kill(kind)
            replaced = time.monotonic()
            until(lambda: statuses(url, "mine", 1) | statuses(url, "poet", 1) == {200})
            print(f"{kind}: added models are known {time.monotonic() - replaced:.1f} s after it was replaced")
            assert time.monotonic() - replaced < 10
            until(lambda: complete(url, "mine").status_code == 200)
            assert (fingerprint(url, "mine"), fingerprint(url, "poet")) == (weights, adapted)
            until(lambda: complete(url, "nobody").status_code == 404)
            assert statuses(url, "checkpoint-1", 50) == {200}
        assert add(url, place, "second").status_code == 201
        rows = requests.get(f"{url}/admin/models", headers=ADMIN, timeout=60).json()["data"]
        assert [(row["model"], row["origin"]) for row in rows] == [
            ("base", "yaml"),
            ("mine", "post"),
            ("poet", "post"),
            ("second", "post"),
            ("checkpoint-1", "folder"),
        ]
    with serving(cluster, args(place)) as url:  # As after the head's death, when the whole application begins anew.
        assert statuses(url, "mine", 50) | statuses(url, "poet", 50) | statuses(url, "second", 50) == {200}
        assert (fingerprint(url, "mine"), fingerprint(url, "poet")) == (weights, adapted)
