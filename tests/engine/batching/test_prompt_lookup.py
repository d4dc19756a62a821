"""Draft tokens save steps and change no text."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from deployments.engine.batching import prompt_lookup
from deployments.engine.speedups.draft import Drafter
from model_loaders.demo import load_model
from model_loaders.demo.worlds import make_world
from tests.engine.architectures import decoder
from tests.engine.running import Answer, batching_engine, generate_alone, submit
from tests.engine.test_parity import LONG, staggered

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = LONG.prompts


class Oracle(Drafter):
    """Random models hardly repeat themselves: it knows their texts, and is wrong now and then at any place."""

    known: ClassVar[list[list[int]]] = []
    confirmed: ClassVar[int] = 0

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        chance = random.Random(len(ids))
        whole = next((text for text in self.known if text[: len(ids)] == list(ids)), [])
        drafted = whole[len(ids) : len(ids) + chance.randrange(most + 1)]
        return [token if chance.random() < 0.8 else 3 for token in drafted]

    def learn(self, right: int, length: int) -> None:
        Oracle.confirmed += right
        super().learn(right, length)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> type[Oracle]:
    monkeypatch.setattr(prompt_lookup, "Drafter", Oracle)
    monkeypatch.setattr(Oracle, "known", [])
    monkeypatch.setattr(Oracle, "confirmed", 0)
    return Oracle


@pytest.mark.parametrize("kind", ["llama", "gpt2", "deepseek_v3"])
def test_sequences_give_what_generate_gives(kind: str, oracle: type[Oracle]) -> None:
    model = decoder(kind)
    alone = [generate_alone(model, ids, count) for ids, count in zip(PROMPTS, LONG.tokens, strict=True)]
    oracle.known += [[*ids, *known.token_ids] for ids, known in zip(PROMPTS, alone, strict=True)]
    engine = batching_engine(model, max_batch_size=prompt_lookup.MOST_SEQUENCES, prefill_chunk=32, prompt_lookup=5)
    answers = staggered(engine, LONG, PROMPTS)
    engine.close(5)
    assert oracle.confirmed > 30
    for i, answer in enumerate(answers):
        count = len(answer.token_ids)
        assert count >= LONG.dropped.get(i, LONG.tokens[i])
        assert answer.token_ids == alone[i].token_ids[:count], f"request {i}"
        assert answer.logprobs == pytest.approx(alone[i].logprobs[:count], abs=1e-4), f"request {i}"


def texts(answers: list[Answer]) -> list[tuple[str, str | None]]:
    return [(answer.wait().text, answer.deltas[-1].finish_reason) for answer in answers]


def test_drawn_stopped_and_constrained_texts_are_the_same(oracle: type[Oracle]) -> None:
    model = decoder("llama")
    stop = f"<{generate_alone(model, PROMPTS[3], 30).token_ids[20]}>"
    asked: list[tuple[int, dict[str, Any]]] = [
        (0, {"temperature": 0.05, "seed": 1}),
        (3, {"stop": (stop,)}),
        (4, {"repetition_penalty": 1.3}),
        (5, {"temperature": 0.7, "top_p": 0.5, "seed": 2, "logprobs": 2}),
        (6, {"min_tokens": 10, "frequency_penalty": 0.2}),
    ]
    found = []
    for most in (0, 6):
        engine = batching_engine(model, max_batch_size=2, prompt_lookup=most)
        answers = [submit(engine, PROMPTS[i], 30, **sampling) for i, sampling in asked]
        found.append(texts(answers))
        oracle.known += [[*PROMPTS[i], *answer.token_ids] for (i, _), answer in zip(asked, answers, strict=True)]
        assert not most or oracle.confirmed > 20
        engine.close(5)
    assert found[0] == found[1]


def test_an_agents_answers_are_drafted() -> None:
    """With the bundled model, in one of its worlds: no oracle."""
    info = load_model()
    steps, said = {}, {}
    for most in (0, 6):
        engine = batching_engine(info.model, prompt_lookup=most)
        said[most] = []
        world = make_world(random.Random(1))
        messages = world.reset()
        while messages[-1]["role"] == "user":
            ids = info.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            answer = submit(engine, ids, 60, stop_token_ids=(info.tokenizer.eos_token_id,)).wait()
            text = info.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            said[most].append((text, answer.cached_tokens))
            messages.append({"role": "assistant", "content": text})
            if (observation := world.step(text).observation) is not None:
                messages.append(observation)
        steps[most] = engine.stats().steps
        engine.close(5)
    assert said[0] == said[6]
    assert len(said[0]) > 2
    assert steps[6] < 0.6 * steps[0]


def test_many_sequences_are_not_drafted_for(oracle: type[Oracle]) -> None:
    model = decoder("llama")
    oracle.known.append([*PROMPTS[1], *generate_alone(model, PROMPTS[1], 40).token_ids])
    engine = batching_engine(model, max_batch_size=8, prompt_lookup=6)
    answers = [submit(engine, PROMPTS[1], 40) for _ in range(2 * prompt_lookup.MOST_SEQUENCES)]
    while engine.stats().sequences < len(answers):
        time.sleep(0.001)
    before, tokens = oracle.confirmed, sum(len(answer.token_ids) for answer in answers)
    assert tokens < 200
    for answer in answers:
        answer.wait()
    assert oracle.confirmed == before
    submit(engine, PROMPTS[1], 40).wait()
    assert oracle.confirmed > before
    engine.close(5)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [("mistral", {}, "cannot be cut back"), ("llama", {"deterministic": True}, "token by token")],
)
def test_models_that_are_not_drafted_for(
    kind: str, options: dict[str, Any], reason: str, oracle: type[Oracle], caplog: pytest.LogCaptureFixture
) -> None:
    model = decoder(kind)
    oracle.known.append([*PROMPTS[1], *generate_alone(model, PROMPTS[1], 20).token_ids])
    with caplog.at_level(logging.WARNING):
        engine = batching_engine(model, prompt_lookup=4, **options)
    assert "prompt_lookup=4 has no effect" in caplog.text
    assert reason in caplog.text
    submit(engine, PROMPTS[1], 20).wait()
    assert oracle.confirmed == 0
    engine.close(5)
