"""Adapters under Ray Serve: replicas hold the base, requests of its adapters go to where it is."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from tests.adapters.lora import write_adapter
from tests.e2e.test_added_models import ADMIN, until
from tests.serving import serving
from tests.tiny import byte_tokenizer, llama


def text(url: str, model: str) -> str:
    body = {"model": model, "prompt": "some text", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_adapters_over_one_base(cluster: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for i in range(4):
        write_adapter(llama(), tmp_path / "made" / f"a{i}", ("q_proj", "up_proj"), seed=i)
    shutil.copytree(tmp_path / "made" / "a1", tmp_path / "run" / "a1")
    shutil.copytree(tmp_path / "made", tmp_path / "allowed")
    base = {
        "id": "base",
        "loader": "model_loaders.auto:load_model",
        "kwargs": {"model_name": str(tmp_path / "base")},
        "engine": {"pack_linears": False, "threads": 1},
    }
    args: dict[str, Any] = {
        "models": [base, {"id": "a0", "base": "base", "adapter": str(tmp_path / "made" / "a0")}],
        "folders": [{"glob": str(tmp_path / "run" / "*"), "base": "base", "every_s": 0.2}],
        "settle_s": 0.1,
        "state_dir": str(tmp_path / "state"),
        "max_models_per_replica": 1,
        "api": {"admin_keys": ["admin"], "admin_roots": [str(tmp_path / "allowed")]},
    }
    with serving(cluster, args, num_replicas=2) as url:
        for i in (2, 3):
            body = {"id": f"a{i}", "base": "base", "adapter": str(tmp_path / "allowed" / f"a{i}")}
            assert requests.post(f"{url}/admin/models", json=body, headers=ADMIN, timeout=60).status_code == 201
        names = ["base", "a0", "a1", "a2", "a3"]
        until(lambda: requests.get(f"{url}/v1/models/a1", timeout=30).status_code == 200)
        with ThreadPoolExecutor(3) as pool:  # four could keep the base busy, so that a second replica loads it
            texts = list(pool.map(lambda name: text(url, name), names * 4))
        assert texts == texts[:5] * 4
        assert len(set(texts)) == 5
        replicas = requests.get(f"{url}/admin/replicas", headers=ADMIN, timeout=30).json()["data"]
        held = [replica for replica in replicas if replica["models"]]
        # Adapters take no places, and the base is loaded once for all of them.
        assert [[model["id"] for model in replica["models"]] for replica in held] == [["base"]]
        assert {adapter["id"] for adapter in held[0]["models"][0]["adapters"]} == {"a0", "a1", "a2", "a3"}
        assert [replica["evictions"] for replica in held] == [0]
        rows = requests.get(f"{url}/admin/models", headers=ADMIN, timeout=30).json()["data"]
        assert {row["model"]: row["origin"] for row in rows if row["parent"] == "base"} == {
            "a0": "yaml",
            "a1": "folder",
            "a2": "post",
            "a3": "post",
        }
        gone = requests.delete(f"{url}/admin/models/a2", headers=ADMIN, timeout=60).json()
        assert gone == {"model": "a2", "deleted": True, "unloaded": 1}
        unknown = requests.post(f"{url}/v1/completions", json={"model": "base:a2", "prompt": "a"}, timeout=60)
        assert unknown.status_code == 404
