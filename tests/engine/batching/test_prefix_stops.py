"""States, and windows that have slid on, are kept where other prompts will need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from deployments.engine.batching.engine import BatchingEngine
from tests.engine.architectures import decoder
from tests.engine.running import generate_alone, prompt, running, submit
from tests.forms import some

TOKENS = 6
NOT_CUT = some("kind", ("mistral", "gemma3_text", "mamba2", "qwen3_next"), ("mistral", "qwen3_next"))
"""Models with a window of 16 tokens, or with states."""


def questions(count: int) -> list[list[int]]:
    """Prompts of 100 tokens of examples and a question of its own each."""
    return [[*prompt(0, 100), 3 + i, *prompt(100 + i, 20)] for i in range(count)]


def asked(engine: BatchingEngine, model: Any, ids: Sequence[int]) -> int:
    """How many tokens of a prompt were reused, for the text that it has alone."""
    answer = submit(engine, list(ids), TOKENS).wait()
    assert answer.token_ids == generate_alone(model, list(ids), TOKENS).token_ids
    return answer.cached_tokens


@NOT_CUT
def test_questions_after_the_same_examples_share_them(kind: str) -> None:
    """The first does not know where others will part from it; the second stops there."""
    model = decoder(kind)
    with running(model, prefill_chunk=48) as engine:
        assert [asked(engine, model, ids) for ids in questions(5)] == [0, 0, 100, 100, 100]


@NOT_CUT
def test_of_those_that_come_together_one_computes_the_examples(kind: str) -> None:
    model = decoder(kind)
    prompts = questions(6)
    with running(model, max_batch_size=6) as engine:
        answers = [submit(engine, ids, TOKENS) for ids in prompts]
        for ids, answer in zip(prompts, answers, strict=True):
            assert answer.wait().token_ids == generate_alone(model, ids, TOKENS).token_ids
        assert sum(answer.cached_tokens == 100 for answer in answers) >= 4


@NOT_CUT
def test_a_tail_that_the_next_prompt_does_not_have(kind: str) -> None:
    """Some templates open the reasoning of an answer, and leave it out of earlier answers. The second turn shows it."""
    model = decoder(kind)
    history, tail = prompt(0, 90), [7, 9]
    lengths, cached = [], []
    with running(model, prefill_chunk=64) as engine:
        for turn in range(6):
            lengths.append(len(history))
            cached.append(asked(engine, model, [*history, *tail]))
            history += prompt(turn + 1, 80)
    assert cached == [0, 0, *lengths[1:5]]


def test_what_can_be_cut_never_stops() -> None:
    model = decoder("llama")
    with running(model) as engine:
        assert [asked(engine, model, ids) for ids in questions(3)] == [0, 100, 100]
        assert engine.stats().prefix_entries == 3


@pytest.mark.parametrize("kind", ["mistral", "mamba2"])
def test_short_beginnings_are_not_worth_a_stop(kind: str) -> None:
    model = decoder(kind)
    with running(model) as engine:
        for seed in range(3):
            assert asked(engine, model, [*prompt(0, 60), 3 + seed, *prompt(seed, 20)]) == 0


def test_deterministic_mode_has_its_own_borders() -> None:
    model = decoder("mistral")
    with running(model, deterministic=True, prefill_chunk=32) as engine:
        for ids in questions(3):
            assert asked(engine, model, ids) == 0
