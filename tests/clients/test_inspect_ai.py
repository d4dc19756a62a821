"""inspect_ai against the running server: plain questions, and tools that must be called."""

from __future__ import annotations

from pathlib import Path

from model_loaders.demo.tasks import make_tasks
from tests.clients.conftest import client_python, run_script


def test_questions_and_forced_tools(demo: str, tmp_path: Path) -> None:
    tasks = [task for task in make_tasks(60, 3) if len(task.messages) == 1]
    arguments = {
        "url": demo,
        "model": "demo",
        "samples": [[task.messages[0]["content"], task.answer] for task in tasks],
        "log_dir": str(tmp_path),
    }
    logs = run_script(client_python("inspect_ai", "inspect_ai==0.3.285", "openai~=3.51.0"), "inspect_run.py", arguments)
    assert logs["plain"]["status"] == "success"
    assert logs["plain"]["accuracy"] >= 0.9
    assert all(logs["plain"]["logprobs"])
    assert logs["tools"]["status"] == "success"
    assert len(logs["tools"]["calls"]) >= 4
    for parse_error, function, arguments_of_call in logs["tools"]["calls"]:
        assert parse_error is None
        assert function == "note"
        assert isinstance(arguments_of_call["text"], str)
        assert isinstance(arguments_of_call["times"], int)
