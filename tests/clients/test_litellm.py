"""litellm in mini-swe-agent's loop: one tool, the assistant's messages echoed as they came, its error classes."""

from __future__ import annotations

from tests.clients.conftest import client_python, run_script


def test_the_agent_loop_and_the_error_classes(demo: str) -> None:
    python = client_python("litellm", "litellm==1.109.1")
    results = run_script(python, "litellm_run.py", {"url": demo, "model": "demo"})
    for provider in ("openai", "hosted_vllm"):
        steps = results[provider]["steps"]
        assert all(len(calls) >= 1 for calls in steps)
        assert all(
            name == "bash" and isinstance(arguments["command"], str) for calls in steps for _, name, arguments in calls
        )
        ids = [call_id for calls in steps for call_id, _, _ in calls]
        assert len(set(ids)) == len(ids)
        assert results[provider]["same"]
        assert results[provider]["free"] in ("stop", "length", "tool_calls")
    assert results["overflow"] == "ContextWindowExceededError"
    assert results["bad"] == "BadRequestError"
    assert results["unknown"] == "NotFoundError"
