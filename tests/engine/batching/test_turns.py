"""The order of first tokens when requests wait, and what less urgent ones give up for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deployments.core.calls import SamplingParams, Turn
from deployments.core.events import Delta, EngineEvent
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.base.turns import PATIENCE
from tests.engine.architectures import decoder
from tests.engine.running import generate_alone, prompt
from tests.engine.stepped import Stepped


class Turns(Stepped):
    """A step loop that notes who gets a first token, and who ends.

    Attributes:
        first: names in the order of their first tokens.
        ended: names in the order of their ends.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.first: list[str] = []
        self.ended: list[str] = []
        self._count = 0

    def ask(self, name: str, *, tokens: int = 2, ids: list[int] | None = None, **turn: Any) -> list[int]:
        """Queue a greedy request; its prompt."""
        ids = prompt(self._count, 6 + self._count % 5) if ids is None else ids
        self._count += 1
        self.texts[name] = []

        def emit(event: EngineEvent) -> None:
            assert isinstance(event, Delta), event
            if name not in self.first:
                self.first.append(name)
            self.texts[name].extend(event.token_ids)
            if event.finish_reason is not None:
                self.ended.append(name)

        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self.queue(EngineRequest(request_id=name, input_ids=ids, sampling=sampling, turn=Turn(**turn)), emit)
        return ids

    def step(self, until: Callable[[], bool]) -> None:
        with torch.inference_mode():
            while not until():
                self.loop.step()


@pytest.fixture(scope="module")
def llama() -> Any:
    return decoder("llama")


def test_first_tokens_come_by_priority_and_then_in_turn(llama: Any) -> None:
    turns = Turns(llama, max_batch_size=1)
    for i in range(3):
        turns.ask(f"a{i}", client="a")
    turns.ask("b0", client="b")
    turns.ask("low", priority=7, client="b")
    turns.ask("high", priority=-7, client="a")
    turns.run()
    assert turns.first == ["high", "a0", "b0", "a1", "a2", "low"]


def test_one_request_beside_four_hundred_of_another_client_begins_next(llama: Any) -> None:
    turns = Turns(llama, max_batch_size=4)
    for i in range(400):
        turns.ask(f"a{i}", tokens=1, client="a")
    turns.step(lambda: len(turns.ended) >= 8)
    turns.ask("b", tokens=1, client="b")
    turns.step(lambda: "b" in turns.first)
    assert len(turns.ended) <= 17, "the four that run, a turn of the other client, and those that one forward computes"


def test_choices_of_one_request_are_one_turn(llama: Any) -> None:
    turns = Turns(llama, max_batch_size=1)
    ids = prompt(99, 24)
    turns.ask("a0", client="a")
    for i in range(3):
        turns.ask(f"b{i}", ids=ids, client="b", group="b")
    turns.ask("a1", client="a")
    turns.run()
    assert turns.first == ["a0", "b0", "b1", "b2", "a1"]
    assert turns.loop.stats().cached_tokens >= 2 * 16, "the later choices begin with the prompt of the first"


def test_what_is_less_urgent_gives_up_its_place_at_once_and_its_text_is_the_same(llama: Any) -> None:
    turns = Turns(llama, max_batch_size=2)
    asked = {name: turns.ask(name, tokens=40, priority=5) for name in ("low0", "low1")}
    turns.step(lambda: len(turns.texts["low1"]) >= 10)
    asked["live0"] = turns.ask("live0", tokens=6)
    turns.step(lambda: "live0" in turns.first)
    assert len(turns.texts["low1"]) <= 12, "it begins in the next step"
    asked["live1"] = turns.ask("live1", tokens=6)
    asked["live2"] = turns.ask("live2", tokens=6)
    turns.run()
    assert turns.ended[:3] == ["live0", "live1", "live2"]
    for name, ids in asked.items():
        assert turns.texts[name] == generate_alone(llama, ids, 40 if "low" in name else 6).token_ids, name


def test_a_batch_size_of_one_and_a_canceled_request_leave_nothing_behind(llama: Any) -> None:
    turns = Turns(llama, max_batch_size=1)
    turns.ask("low", tokens=30, priority=5)
    turns.ask("other", tokens=30, priority=5)
    turns.step(lambda: len(turns.texts["low"]) >= 3)
    turns.ask("live", tokens=3)
    turns.step(lambda: "live" in turns.first)
    assert (turns.loop.stats().sequences, turns.loop.stats().waiting) == (2, 1)
    turns.cancel("low")
    turns.run()
    assert turns.ended == ["live", "other"]
    stats = turns.loop.stats()
    assert (stats.sequences, stats.waiting, stats.cache_bytes) == (0, 0, 0)


def test_nothing_starves_under_urgent_requests_without_an_end(llama: Any) -> None:
    turns = Turns(llama, max_batch_size=2)
    for name in ("low0", "low1", "low2"):
        turns.ask(name, tokens=12, priority=1000)
    count = 0

    def more() -> bool:
        nonlocal count
        while turns.loop.stats().waiting < 5:
            turns.ask(f"live{count}", tokens=2, client=f"client{count % 3}")
            count += 1
        return len([name for name in turns.ended if name.startswith("low")]) == 3

    turns.step(more)
    assert count <= 8 * PATIENCE, "each of the three has its turn by age"


def test_less_urgent_sequences_leave_memory_for_the_others(llama: Any) -> None:
    ids = [prompt(i, 100) for i in range(6)]
    turns = Turns(llama, limits=lambda sizes: {"budget": sizes.of_sequence(128) * 4}, max_batch_size=8)
    for i in range(4):
        turns.ask(f"low{i}", tokens=20, ids=ids[i], priority=1)
    turns.step(lambda: len(turns.first) >= 3)
    turns.ask("live", tokens=4, ids=ids[4])
    turns.step(lambda: "live" in turns.first)
    assert "low3" not in turns.first
    turns.run()
    assert len(turns.ended) == 5


def test_prompts_are_computed_in_shorter_chunks_while_more_urgent_requests_come(llama: Any) -> None:
    turns = Turns(llama, prefill_chunk=64)
    turns.ask("low0", ids=prompt(0, 128), tokens=1, priority=5)
    assert turns.run() == 2
    turns.ask("live", tokens=1)
    turns.run()
    turns.ask("low1", ids=prompt(1, 128), tokens=1, priority=5)
    assert turns.run() == 8


def test_a_failed_step_computes_what_has_given_up_its_place_again(llama: Any) -> None:
    turns = Turns(llama, max_batch_size=1)
    ids = turns.ask("low", tokens=12, priority=5)
    turns.step(lambda: len(turns.texts["low"]) >= 4)
    turns.ask("live", tokens=4)
    turns.step(lambda: "live" in turns.first)
    turns.loop.recovery.after_step(RuntimeError("a step failed"))
    turns.run()
    assert turns.texts["low"] == generate_alone(llama, ids, 12).token_ids
    assert turns.loop.idle
