"""A run of lm_eval that is killed and started again: no call that had been answered is computed again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.clients.conftest import WEIGHTS
from tests.clients.test_lm_eval import REMOTE, completions, evaluate, python, tasks  # noqa: F401
from tests.serving import serving

Line = dict[str, Any]


def computed(record: Path) -> list[Line]:
    """The recorded calls that have an answer; one that comes from the record is not recorded."""
    lines = [line for file in record.glob("calls-*.jsonl") for line in file.read_text().splitlines(keepends=True)]
    return [call for call in map(json.loads, (line for line in lines if line.endswith("\n"))) if call.get("usage")]


def killed_after(calls: int, record: Path, command: str, python: Path, folder: Path) -> None:  # noqa: F811
    """Run shell lines until `calls` calls are recorded, then SIGKILL the client."""
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    client = subprocess.Popen(["bash", "-c", command], cwd=folder, env=environment, start_new_session=True)
    try:
        while len(computed(record)) < calls:
            assert client.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
    finally:
        os.killpg(client.pid, signal.SIGKILL)
        client.wait()


def test_a_killed_run_computes_nothing_twice(cluster: str, python: Path, tasks: Path, tmp_path: Path) -> None:  # noqa: F811
    record = tmp_path / "record"
    kwargs = {"model_name": str(WEIGHTS), "dtype": "float32"}
    model = {"id": "folder", "loader": "model_loaders.auto:load_model", "kwargs": kwargs}
    with serving(cluster, {"models": [model], "api": {"record_dir": str(record), "resume": True}}) as url:
        command = completions(url, tasks, REMOTE, concurrent=2)
        killed_after(20, record, command, python, tmp_path)
        before = len(computed(record))
        samples = evaluate(python, tasks, command)
        calls = computed(record)
        again = evaluate(python, tasks, command)
        assert len(computed(record)) == len(calls), "a third run computes nothing"
    assert {name: len(rows) for name, rows in samples.items()} == {"choices": 16, "rolling": 12, "generated": 16}
    assert {task: [row["resps"] for row in rows] for task, rows in samples.items()} == {
        task: [row["resps"] for row in rows] for task, rows in again.items()
    }
    assert 20 <= before < len(calls), "the run was killed midway"
    assert [call for call, times in Counter(line["call"] for line in calls).items() if times > 1] == []
