"""AgentBench v0.2 itself, in the folder that AGENTBENCH_REPO names: a lost replica changes no score, and right answers
have every point."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from deployments.cli.endpoint.processes import free_port
from tests.clients.conftest import client_python, run_shell
from tests.clients.page import block

REPO = os.environ.get("AGENTBENCH_REPO", "")
SHORT = "{truncate_prompt_tokens: 1500, max_tokens: 64}"
"""The demo model has a context of 2048 tokens of a byte each."""

pytestmark = pytest.mark.skipif(not REPO, reason="AGENTBENCH_REPO names no folder of AgentBench v0.2")


@pytest.fixture(scope="module")
def python() -> Path:
    return client_python("AgentBench")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`troupe serve` with two replicas of the demo model, and of one that knows the answers of dbbench."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    kwargs = {"benchmark": "dbbench", "data": str(Path(REPO).resolve() / "data" / "dbbench" / "dev.jsonl")}
    models = [
        {"id": "demo", "loader": "model_loaders.demo:load_model", "preload": True},
        {"id": "oracle", "loader": "tests.clients.oracle:load_model", "kwargs": kwargs},
    ]
    app = {
        "name": "troupe", "route_prefix": "/", "import_path": "deployments.app:build_app",
        "args": {"models": models, "max_models_per_replica": 2},
        "deployments": [{"name": "ModelReplica", "num_replicas": 2}],
    }  # fmt: skip
    (folder / "my.yaml").write_text(yaml.safe_dump({"applications": [app]}))
    command = [sys.executable, "-m", "deployments.cli.main", "serve", "my.yaml", "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(url):
            assert process.poll() is None
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=10).status_code == 200
    except requests.ConnectionError:
        return False


def run(server: str, python: Path, folder: Path, tasks: str, workers: int, model: str = "demo") -> dict[str, Any]:
    """The samples by task and index, after the command of docs/clients.md."""
    fields = f" --fields '{SHORT}'" if model == "demo" else ""
    changes = {
        "--config my.yaml": f"--url {server} --model {model}{fields} --output {folder}",
        "../AgentBench": REPO,
        "agentbench-env/bin/python": str(python),
        "avalon,ltp": tasks,
        "--workers 32": f"--workers {workers}",
        "git clone --branch v0.2 https://github.com/THUDM/": "true ",
        "python3 -m venv agentbench-env\nsource agentbench-env/bin/activate\n": "",
        "deactivate\n": "",
        "troupe agentbench": f"{sys.executable} -m deployments.cli.main agentbench",
    }
    printed = run_shell(python, block("AgentBench", "bash", 0, changes), folder, timeout=3600)
    files = sorted(folder.glob(f"{model}/*/runs.jsonl"))
    assert files
    for file in files:
        assert str(file.with_name("overall.json")) in printed
    lines = {file.parent.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    return {name: {line["index"]: line["output"] for line in each} for name, each in lines.items()}


def kill_a_replica(server: str, folder: Path) -> None:
    """Once a sample has ended."""
    while not list(folder.glob("demo/*/runs.jsonl")):
        time.sleep(0.2)
    pid = requests.get(f"{server}/health?verbose", timeout=30).json()["data"][0]["pid"]
    os.kill(pid, signal.SIGKILL)


def test_a_lost_replica_changes_no_sample(server: str, python: Path, tmp_path: Path) -> None:
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    whole.mkdir()
    lost.mkdir()
    expected = run(server, python, whole, "avalon,ltp", 32)
    assert {name: len(samples) for name, samples in expected.items()} == {"avalon-dev-single": 20, "ltp-dev": 20}
    killer = threading.Thread(target=kill_a_replica, args=(server, lost))
    killer.start()
    assert run(server, python, lost, "avalon,ltp", 32) == expected
    killer.join()


def test_sixteen_workers(server: str, python: Path, tmp_path: Path) -> None:
    assert len(run(server, python, tmp_path, "avalon", 16)["avalon-dev-single"]) == 20


@pytest.mark.skipif(shutil.which("my_print_defaults") is None, reason="MariaDB is not installed")
def test_right_statements_and_answers_have_every_point(
    server: str, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several MariaDBs at once, whose results are those of the MySQL that the answers were computed with."""
    with tempfile.TemporaryDirectory(prefix="t") as data:  # short: a socket is below it
        monkeypatch.setenv("TMPDIR", data)
        samples = run(server, python, tmp_path, "dbbench", 4, model="oracle")["dbbench-dev"]
        assert list(Path(data).glob("ab-*")) == [], "the data of the servers are removed"
    assert len(samples) == 60
    overall = json.loads((tmp_path / "oracle" / "dbbench-dev" / "overall.json").read_text())
    assert {name: value for name, value in overall["custom"].items() if value != 1.0} == {}
