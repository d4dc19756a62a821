"""inspect_ai against the running server: plain questions, and tools that must be called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model_loaders.demo.tasks import make_tasks
from tests.clients.conftest import client_python, run_shell
from tests.clients.page import block


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks = [task for task in make_tasks(60, 3) if len(task.messages) == 1]
    samples = [[task.messages[0]["content"], task.answer] for task in tasks]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    shutil.copy(Path(__file__).parent / "inspect_tasks.py", tmp_path / "task.py")
    return tmp_path


def evaluate(url: str, folder: Path, task: str, model: str) -> Any:
    """The log that `inspect eval` of docs/clients.md leaves."""
    changes = {
        "http://127.0.0.1:8000": url,
        "my-checkpoint": model,
        "task.py": f"task.py@{task} --max-tokens 200 --display none --log-format json --log-dir logs",
    }
    run_shell(client_python("inspect_ai"), block("inspect_ai", "bash", 0, changes), folder)
    (log,) = folder.glob("logs/*.json")
    return json.loads(log.read_text())


def test_questions(folder_model: str, folder: Path) -> None:
    log = evaluate(folder_model, folder, "plain", "folder")
    assert log["status"] == "success"
    (score,) = log["results"]["scores"]
    assert score["metrics"]["accuracy"]["value"] >= 0.9
    for sample in log["samples"]:
        (choice,) = sample["output"]["choices"]
        assert choice["stop_reason"] == "stop"
        assert all(len(entry["top_logprobs"]) == 3 for entry in choice["logprobs"]["content"])
        assert sample["output"]["usage"]["output_tokens"] == len(choice["logprobs"]["content"])


def test_tools_that_must_be_called(folder_model: str, folder: Path) -> None:
    log = evaluate(folder_model, folder, "tools", "agent")
    assert log["status"] == "success"
    for sample in log["samples"]:
        calls = [call for message in sample["messages"] for call in message.get("tool_calls") or []]
        assert calls
        for call in calls:
            assert call.get("parse_error") is None
            assert call["function"] == "note"
            assert isinstance(call["arguments"]["text"], str)
            assert isinstance(call["arguments"]["times"], int)
        results = [message for message in sample["messages"] if message["role"] == "tool"]
        assert [result["tool_call_id"] for result in results] == [call["id"] for call in calls]
        assert all(result["content"].startswith("noted ") for result in results)
