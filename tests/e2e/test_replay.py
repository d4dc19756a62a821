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
from tests.serving import serving

WORKERS = 32
TINY = {
    "id": "tiny",
    "loader": "tests.openai.tiny_models:load_model",
    "engine": {"pack_linears": False, "max_batch_size": 16, "threads": 1},
}
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


@pytest.mark.parametrize(
    ("model", "calls", "replicas"),
    [
        pytest.param(TINY, 64, (2,), id="short"),
        pytest.param(TINY, 640, (1, 4), id="random", marks=pytest.mark.long),
        pytest.param(DEMO, 640, (1, 4), id="demo", marks=pytest.mark.long),
    ],
)
def test_calls_on_one_and_on_several_replicas(
    cluster: str, tmp_path: Path, capsys: Capture, model: dict[str, Any], calls: int, replicas: tuple[int, ...]
) -> None:
    args = {"models": [model], "max_models_per_replica": 2}
    equal = {"equal": calls, "differs": 0, "failed": 0, "skipped": 0}
    with serving(cluster, {**args, "api": {"record_dir": str(tmp_path / "record")}}) as url:

        def post(body: dict[str, Any]) -> int:
            return requests.post(f"{url}/v1/chat/completions", json=body, timeout=600).status_code

        with ThreadPoolExecutor(WORKERS) as pool:
            assert set(pool.map(post, bodies(model["id"], calls))) == {200}
    # The folder, without what the replay itself would add.
    for count in replicas:
        with serving(cluster, args, num_replicas=count) as url:
            assert replayed(tmp_path / "record", url, capsys) == equal
            pids = {each["pid"] for each in requests.get(f"{url}/health?verbose", timeout=30).json()["data"]}
            assert len(pids) == count
