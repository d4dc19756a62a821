"""litellm in mini-swe-agent's loop: one tool, the assistant's messages echoed as they came, its error classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.conftest import client_python, run_script, run_shell
from tests.clients.page import block


@pytest.fixture(autouse=True)
def local_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """litellm reads its list of prices from the network otherwise."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_the_agent_loop(folder_model: str, tmp_path: Path, provider: str) -> None:
    changes = {
        "http://127.0.0.1:8000": folder_model,
        "openai/my-checkpoint": f"{provider}/agent",
        "temperature=0": "temperature=0, max_tokens=120",
    }
    (tmp_path / "loop.py").write_text(block("litellm", "python", 0, changes))
    lines = run_shell(client_python("litellm"), "python loop.py", tmp_path).splitlines()
    calls = [line.partition(" ") for line in lines if line.startswith("bash ")]
    assert len(calls) >= 3
    assert all(isinstance(json.loads(arguments)["command"], str) for _, _, arguments in calls)


def test_streams_and_error_classes(folder_model: str) -> None:
    given = {"url": folder_model, "model": "agent"}
    results = run_script(client_python("litellm"), "litellm_run.py", given)
    for provider in ("openai", "hosted_vllm"):
        whole, streamed = results[provider]["texts"]
        assert whole == streamed
        assert whole
        whole, streamed = results[provider]["calls"]
        assert whole == streamed
        ((name, arguments),) = whole
        assert name == "bash"
        assert len(arguments["command"]) >= 5
        assert results[provider]["free"] in ("stop", "length", "tool_calls")
    assert results["overflow"] == "ContextWindowExceededError"
    assert results["bad"] == "BadRequestError"
    assert results["unknown"] == "NotFoundError"
