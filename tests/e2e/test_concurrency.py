"""Benchmark workers at once: every call answered, every answer that of the same chat asked alone."""

from __future__ import annotations

import pytest
import requests
from openai import OpenAI

from tests.workload import Ran, alone, ask_by_post, ask_by_stream, run


def _check(ran: Ran, answers_alone: list[str]) -> None:
    mixed_up = [
        (call.messages[-1], call.answer, answer)
        for call, answer in zip(ran.calls, answers_alone, strict=True)
        if call.answer != answer
    ]
    assert mixed_up == []
    assert ran.right >= 0.95 * ran.tasks
    assert sum(ran.scores) >= 0.9 * len(ran.scores)


@pytest.mark.parametrize(
    ("tasks", "episodes", "calls"), [(30, 3, 40), pytest.param(400, 32, 600, marks=pytest.mark.long)]
)
def test_32_workers_in_the_manner_of_agentbench(demo: str, tasks: int, episodes: int, calls: int) -> None:
    ask = ask_by_post(demo)
    ran = run(ask, tasks=tasks, episodes=episodes, workers=32)
    assert len(ran.calls) >= calls
    _check(ran, alone(ask, ran.calls))


@pytest.mark.parametrize(("tasks", "episodes"), [(9, 1), pytest.param(160, 16, marks=pytest.mark.long)])
def test_32_workers_through_the_streaming_client(demo: str, tasks: int, episodes: int) -> None:
    client = OpenAI(base_url=f"{demo}/v1", api_key="EMPTY", max_retries=0, _strict_response_validation=True)
    ran = run(ask_by_stream(client), tasks=tasks, episodes=episodes, workers=32, seed=2)
    _check(ran, alone(ask_by_post(demo), ran.calls))


def test_a_request_that_asks_for_several_things_at_once(demo: str) -> None:
    """A decision renders its prompts and labels at once: none of these calls is lost on the way to a replica."""
    questions = [{"type": "predicate", "instructions": f"The sum is {total}."} for total in (41, 42, 43)]
    body = {"model": "demo", "input": "27 + 15", "questions": questions}
    for _ in range(10):
        response = requests.post(f"{demo}/v1/decisions", json=body, timeout=20)
        assert len(response.json()["answers"]) == 3
