"""mini-swe-agent's own loop: its tool, its messages, a shell that has no programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.conftest import client_python, run_shell
from tests.clients.page import block


def test_the_loop(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("MSWEA_GLOBAL_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("MSWEA_SILENT_STARTUP", "1")
    changes = {
        "http://127.0.0.1:8000": folder_model,
        "openai/my-checkpoint": "openai/agent",
        '"temperature": 0': '"temperature": 0, "max_tokens": 120',
        "LocalEnvironment()": 'LocalEnvironment(env={"PATH": "/nowhere"}, timeout=5)',
        'print(agent.run("List the files.")["exit_status"])': (
            'print(agent.run("List the files.")["exit_status"])\nimport json\nprint(json.dumps(agent.messages))'
        ),
    }
    (tmp_path / "loop.py").write_text(block("mini_swe_agent", "python", 0, changes))
    *_, status, messages = run_shell(client_python("mini_swe_agent"), "python loop.py", tmp_path).splitlines()
    assert status == "LimitsExceeded"
    answers = [message for message in json.loads(messages) if message["role"] == "assistant"]
    assert len(answers) == 3
    for answer in answers:
        for call in answer["tool_calls"]:
            assert call["function"]["name"] == "bash"
            assert isinstance(json.loads(call["function"]["arguments"])["command"], str)
