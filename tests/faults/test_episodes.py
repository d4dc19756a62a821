"""Forty agent episodes of the demo model; a replica is killed in the middle of them."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from tests.conftest import DEMO
from tests.faults.clients import KEY, replicas
from tests.faults.conftest import Say
from tests.serving import serving
from tests.workload import Messages, ask_by_post, run

EPISODES = 40


@pytest.fixture
def url(cluster: str) -> Any:
    args = {"models": [{**DEMO, "preload": True}], "api": {"api_keys": [KEY, "EMPTY"], "admin_keys": [KEY]}}
    with serving(cluster, args, num_replicas=2, ray_actor_options={"num_gpus": 0, "num_cpus": 0.5}) as address:
        yield address


@pytest.mark.long
def test_a_killed_replica_changes_no_score(url: str, say: Say) -> None:
    ask = ask_by_post(url)
    undisturbed = run(ask, tasks=0, episodes=EPISODES, workers=8)
    half = len(undisturbed.calls) // 2
    answered, lock = 0, threading.Lock()

    def ask_and_kill(messages: Messages) -> str:
        nonlocal answered
        with lock:
            answered += 1
            due = answered == half
        if due:
            busiest = max(replicas(url), key=lambda replica: sum(m["sequences"] for m in replica["models"]))
            os.kill(busiest["pid"], signal.SIGKILL)
        return ask(messages)

    disturbed = run(ask_and_kill, tasks=0, episodes=EPISODES, workers=8)
    before, after = sum(undisturbed.scores), sum(disturbed.scores)
    say(
        f"{len(disturbed.scores)} of {EPISODES} episodes finished with a replica killed halfway, "
        f"score {after:g}, without {before:g}; {len(disturbed.calls)} calls"
    )
    assert len(disturbed.scores) == EPISODES
    assert sorted(disturbed.scores) == sorted(undisturbed.scores)
