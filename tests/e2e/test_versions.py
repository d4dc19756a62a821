"""A checkpoint or an adapter that a training run writes again and again, served by several replicas."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from tests.adapters.lora import merged, write_adapter
from tests.serving import serving
from tests.tiny import byte_tokenizer, llama

BODY = {"model": "run", "prompt": "ab", "max_tokens": 8, "temperature": 0, "ignore_eos": True}

TARGETS = ("q_proj", "v_proj", "up_proj")


class Model:
    """A model whose checkpoint is written again."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.write(0)

    def write(self, seed: int) -> None:
        """Several shards, in place."""
        _write(self.place / "run", seed)

    def alone(self, seed: int) -> Any:
        return llama(seed=seed)

    def entries(self) -> list[dict[str, Any]]:
        return [_entry("run", self.place / "run")]


class Adapter(Model):
    """An adapter that is written again, over a base that stays."""

    def write(self, seed: int) -> None:
        if not (self.place / "base").exists():
            _write(self.place / "base", 0)
        write_adapter(llama(), self.place / "run", TARGETS, seed=seed)

    def alone(self, seed: int) -> Any:
        folder = write_adapter(llama(), self.place / f"alone-{seed}", TARGETS, seed=seed)
        return merged(llama(), folder, lambda name: 2.0)

    def entries(self) -> list[dict[str, Any]]:
        return [_entry("base", self.place / "base"), {"id": "run", "base": "base", "adapter": str(self.place / "run")}]


def _write(folder: Path, seed: int) -> None:
    llama(seed=seed).save_pretrained(folder, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder)


def _entry(name: str, folder: Path) -> dict[str, Any]:
    engine = {"pack_linears": False, "threads": 1}
    kwargs = {"model_name": str(folder)}
    return {"id": name, "loader": "model_loaders.auto:load_model", "kwargs": kwargs, "engine": engine}


class Load:
    """Workers that ask without a pause, and what they were answered: the texts of each fingerprint."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.texts: dict[str, set[str]] = defaultdict(set)
        self.refused: list[str] = []
        self._stop = threading.Event()

    def ask(self) -> str:
        answer = requests.post(f"{self.url}/v1/completions", json=BODY, timeout=120)
        if answer.status_code != 200:
            self.refused.append(answer.text)
            return ""
        found = answer.json()["system_fingerprint"]
        self.texts[found].add(answer.json()["choices"][0]["text"])
        return str(found)

    def work(self) -> None:
        while not self._stop.is_set():
            self.ask()

    def stop(self) -> None:
        self._stop.set()

    def until(self, count: int) -> None:
        """Wait until this number of versions has answered."""
        while len(self.texts) < count:
            self.ask()


def rewritten(url: str, run: Model, seeds: range, every_s: float) -> Load:
    """What workers are answered while a folder is rewritten with each seed, once the one before has answered."""
    load = Load(url)
    with ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(load.work) for _ in range(6)]
        try:
            for count, seed in enumerate(seeds, 1):
                began = time.monotonic()
                run.write(seed)
                load.until(count if every_s == 0 else 0)
                time.sleep(max(0.0, every_s + began - time.monotonic()))
        finally:
            load.stop()
        for worker in workers:
            worker.result()
    return load


def expected(run: Model, seeds: range) -> set[str]:
    """The text of each seed, by its model alone."""
    return {_text(run.alone(seed)) for seed in seeds}


def _text(model: Any) -> str:
    """Greedy decoding with the end of a text as a token like any other."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(BODY["prompt"], return_tensors="pt").input_ids
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return str(tokenizer.decode(ids[0, length:], skip_special_tokens=True))


@pytest.mark.long
@pytest.mark.parametrize("kind", [Model, Adapter])
def test_a_run_that_writes_its_checkpoint_again(cluster: str, tmp_path: Path, kind: type[Model]) -> None:
    run = kind(tmp_path)
    with serving(cluster, {"models": run.entries(), "settle_s": 0.3}, num_replicas=2) as url:
        load = rewritten(url, run, range(3), every_s=0)
        assert load.refused == []
        assert [len(texts) for texts in load.texts.values()] == [1, 1, 1]
        assert {text for texts in load.texts.values() for text in texts} == expected(run, range(3))
        *_, listed = requests.get(f"{url}/v1/models", timeout=10).json()["data"]
        assert listed["fingerprint"] == list(load.texts)[-1]
        old = next(iter(load.texts))
        refused = requests.post(f"{url}/v1/completions", json=BODY, headers={"x-troupe-expect": old}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "version_mismatch")


@pytest.mark.long
@pytest.mark.parametrize("kind", [Model, Adapter])
def test_ten_minutes_of_a_checkpoint_that_is_written_every_three_seconds(
    cluster: str, tmp_path: Path, kind: type[Model]
) -> None:
    """No answer is of two versions, whatever is read while it is written; no replica dies."""
    run = kind(tmp_path)
    with serving(cluster, {"models": run.entries(), "settle_s": 0.5}, num_replicas=2) as url:
        before = pids(url)
        load = rewritten(url, run, range(200), every_s=3)
        assert load.refused == []
        assert len(load.texts) > 20
        assert all(len(texts) == 1 for texts in load.texts.values())
        assert {text for texts in load.texts.values() for text in texts} <= expected(run, range(200))
        assert pids(url) == before


def pids(url: str) -> set[str]:
    replicas = requests.get(f"{url}/health?verbose", timeout=30).json()["data"]
    return {str(replica["pid"]) for replica in replicas}
