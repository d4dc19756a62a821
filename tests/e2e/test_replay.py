"""Calls that one replica has answered, replayed on it and on several replicas: every answer is the same."""

from __future__ import annotations

import contextlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from deployments.cli.main import main
from model_loaders.demo.tasks import make_tasks
from tests.conftest import DEMO
from tests.e2e.conftest import TINY
from tests.serving import serving

WORKERS = 32
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 11, "temperature": 1.0},
    {"temperature": 0, "logprobs": True, "top_logprobs": 2},
    {"seed": 5, "temperature": 0.7, "top_p": 0.9, "n": 2},
    {"temperature": 0, "stream": True, "repetition_penalty": 1.2},
]

Capture = pytest.CaptureFixture[str]


def bodies(model: str, calls: int) -> list[dict[str, Any]]:
    """Different chats; every way of sampling that gives the same answer again."""
    return [
        {"model": model, "messages": list(task.messages), "max_tokens": 4 + number % 12, **sampling}
        for number, (task, sampling) in enumerate(zip(make_tasks(calls, 3), itertools.cycle(SAMPLING), strict=False))
    ]


def replayed(record: Path, url: str, capsys: Capture) -> dict[str, int]:
    """The summary of `troupe replay`, with `WORKERS` calls at a time."""
    capsys.readouterr()
    with contextlib.chdir("."), pytest.raises(SystemExit):
        main(["replay", str(record), "--url", url, "--concurrency", str(WORKERS), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines[:-1] if line["result"] != "equal"] == []
    found: dict[str, int] = lines[-1]["summary"]
    return found


def recorded(cluster: str, folder: Path, model: dict[str, Any], calls: int) -> Path:
    """The record of calls that one replica has answered."""
    record = folder / "record"
    args = {"models": [model], "max_models_per_replica": 2, "api": {"record_dir": str(record)}}
    with serving(cluster, args) as url:

        def post(body: dict[str, Any]) -> int:
            return requests.post(f"{url}/v1/chat/completions", json=body, timeout=600).status_code

        with ThreadPoolExecutor(WORKERS) as pool:
            assert set(pool.map(post, bodies(model["id"], calls))) == {200}
    return record


def check(record: Path, url: str, capsys: Capture, calls: int, replicas: int) -> None:
    """The replicas, whose number is given, answer as the record says."""
    assert replayed(record, url, capsys) == {"equal": calls, "differs": 0, "failed": 0, "skipped": 0}
    found = requests.get(f"{url}/health?verbose", timeout=30).json()["data"]
    assert len({each["pid"] for each in found}) == replicas


def test_calls_of_one_replica_on_two(
    cluster: str, two_ingresses: tuple[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    url, _ = two_ingresses
    check(recorded(cluster, tmp_path, TINY, 64), url, capsys, 64, 2)


@pytest.mark.long
@pytest.mark.parametrize("model", [TINY, DEMO], ids=["random", "demo"])
def test_calls_on_one_and_on_several_replicas(
    cluster: str, tmp_path: Path, capsys: Capture, model: dict[str, Any]
) -> None:
    record = recorded(cluster, tmp_path, model, 640)
    for count in (1, 4):
        # The folder, without what the replay itself would add.
        with serving(cluster, {"models": [model], "max_models_per_replica": 2}, num_replicas=count) as url:
            check(record, url, capsys, 640, count)
