"""Benchmark-shaped traffic for the demo model, in the payload and manner of AgentBench's HTTP agent."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import requests

from model_loaders.demo.tasks import make_tasks
from model_loaders.demo.worlds import make_world

Messages = list[dict[str, Any]]
Ask = Callable[[Messages], str]


@dataclass
class Call:
    """A chat as it was sent, and its answer."""

    messages: Messages
    answer: str


@dataclass
class Ran:
    """What a workload did: its calls, and the score of each episode."""

    calls: list[Call] = field(default_factory=list)
    right: int = 0
    tasks: int = 0
    scores: list[float] = field(default_factory=list)


def ask_by_post(url: str, model: str = "demo", **fields: Any) -> Ask:
    """AgentBench v0.2's way: one POST per call over a connection of its own, 120 s of patience, no retry here."""

    def ask(messages: Messages) -> str:
        body = {"model": model, "temperature": 0, "max_tokens": 512, "messages": messages, **fields}
        answer = requests.post(
            f"{url}/v1/chat/completions",
            json=body,
            headers={"Content-Type": "application/json", "Authorization": "Bearer EMPTY", "Connection": "close"},
            timeout=120,
        )
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        return str(answer.json()["choices"][0]["message"]["content"])

    return ask


def ask_by_stream(client: Any, model: str = "demo", **fields: Any) -> Ask:
    """The official client, streaming."""

    def ask(messages: Messages) -> str:
        stream = client.chat.completions.create(
            model=model, temperature=0, max_tokens=512, messages=messages, stream=True, **fields
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    return ask


def run(ask: Ask, *, tasks: int, episodes: int, workers: int, seed: int = 0) -> Ran:
    """Single questions and whole episodes, from `workers` threads at once."""
    ran = Ran()
    jobs: list[Callable[[], None]] = []
    for task in make_tasks(tasks, seed):
        jobs.append(lambda task=task: _answer(ran, ask, list(task.messages), task.correct))  # type: ignore[misc]
    for i in range(episodes):
        jobs.append(lambda i=i: _play(ran, ask, random.Random(seed * 10_000 + i)))  # type: ignore[misc]
    random.Random(seed).shuffle(jobs)
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()
    return ran


def alone(ask: Ask, calls: Sequence[Call]) -> list[str]:
    """The answers to the same chats, one after the other."""
    return [ask(call.messages) for call in calls]


def _answer(ran: Ran, ask: Ask, messages: Messages, correct: Callable[[str], bool]) -> None:
    answer = ask(messages)
    ran.calls.append(Call(messages, answer))
    ran.tasks += 1
    ran.right += correct(answer)


def _play(ran: Ran, ask: Ask, rng: random.Random) -> None:
    world = make_world(rng)
    messages: Messages = [dict(message) for message in world.reset()]
    while True:
        answer = ask(messages)
        ran.calls.append(Call(list(messages), answer))
        step = world.step(answer)
        if step.done:
            ran.scores.append(step.score)
            return
        assert step.observation is not None
        messages += [{"role": "assistant", "content": answer}, dict(step.observation)]
