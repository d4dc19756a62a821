"""Hooks draw from the state of the whole process; a seed means the same text whoever else draws."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from deployments.config.app import parse_args
from deployments.core.calls import GenerateCall, SamplingParams, TextPrompt
from deployments.core.errors import ModelError
from deployments.core.events import Delta, Failed
from deployments.engine.generate.engine import GenerateEngine
from deployments.engine.model.random_state import RANDOM_STATE
from deployments.host.host import ModelHost
from model_loaders.contract import ModelInfo
from tests.engine.running import Answer, ask, generate_engine, start
from tests.tiny import byte_tokenizer, llama

LLAMA = llama()
PROMPT = list(b"goodbye")
Draw = Callable[[], int]

DRAWS: dict[str, Draw] = {
    "torch": lambda: int(torch.randint(65, 91, (1,))),
    "python": lambda: random.randrange(65, 91),
    "numpy": lambda: int(np.random.randint(65, 91)),
}


def drawing(draw: Draw, *, after_each: Callable[[int], Any] = lambda i: None) -> Callable[..., Any]:
    """A hook that streams what it draws."""

    def generate(input_ids: torch.Tensor, max_new_tokens: int, streamer: Any) -> torch.Tensor:
        streamer.put(input_ids)
        found: list[int] = []
        for i in range(max_new_tokens):
            found.append(draw())
            after_each(i)
            streamer.put(torch.tensor([found[-1]]))
        return torch.cat([input_ids, torch.tensor([found])], dim=1)

    return generate


def at_once(draw: Draw) -> Callable[..., Any]:
    """A hook that shows nothing before its end."""

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([[draw() for _ in range(max_new_tokens)]])], dim=1)

    return generate


def sampling(**kwargs: Any) -> torch.Tensor:
    """What most loaders write."""
    found: torch.Tensor = LLAMA.generate(**{"eos_token_id": 1 << 30, **kwargs}, pad_token_id=0)
    return found


@pytest.fixture
def serve() -> Iterator[Any]:
    engines: list[GenerateEngine] = []

    def make(hook: Callable[..., Any], **options: Any) -> GenerateEngine:
        info = ModelInfo(model=LLAMA, tokenizer=byte_tokenizer(), generate=hook)
        engines.append(generate_engine(info, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(timeout=1.0)


HOOKS = [sampling, *(kind(draw) for draw in DRAWS.values() for kind in (drawing, at_once))]


def test_seeds_do_not_depend_on_the_hooks_of_other_models(serve: Any, one_thread: None) -> None:
    engines = [serve(hook) for hook in HOOKS]
    settings = [{"seed": seed, "temperature": 1.0, "max_tokens": 12} for seed in (1, 2)]
    alone = [[ask(engine, PROMPT, **each).token_ids for each in settings] for engine in engines]
    runs = [[start(engine, PROMPT, **each) for each in settings] for engine in engines]
    assert [[run.wait().token_ids for run in its] for its in runs] == alone
    assert all(first != second for first, second in alone)


def test_turns_are_passed_on_between_tokens(serve: Any) -> None:
    """A long answer does not keep the others waiting, and its numbers go on where they were."""
    others_turn = threading.Event()
    waiting: list[Answer] = []
    short = serve(drawing(DRAWS["torch"], after_each=lambda i: others_turn.set()))

    def begin_other(i: int) -> None:
        if waiting:
            others_turn.wait(0.02)
        elif armed:
            waiting.append(start(short, PROMPT, seed=3, max_tokens=2))

    armed: list[int] = []
    long = serve(drawing(DRAWS["torch"], after_each=begin_other))
    alone = [ask(long, PROMPT, seed=5, max_tokens=400).token_ids, ask(short, PROMPT, seed=3, max_tokens=2).token_ids]
    armed.append(1)
    others_turn.clear()
    tokens = ask(long, PROMPT, seed=5, max_tokens=400).token_ids
    assert others_turn.is_set()
    assert [tokens, waiting[0].wait().token_ids] == alone


def test_a_hook_that_hangs_loses_its_turn_and_a_seed_that_is_lost_is_told(serve: Any) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hanging(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        entered.set()
        leave.wait(20)
        return input_ids

    hung, other = serve(hanging, turn_limit_s=0.05), serve(at_once(DRAWS["torch"]))
    alone = ask(other, PROMPT, seed=3).token_ids
    runs = [start(hung, PROMPT, seed=1), start(hung, PROMPT)]
    assert entered.wait(10)
    assert ask(other, PROMPT, seed=3).token_ids == alone
    leave.set()
    with pytest.raises(ModelError, match="no longer those of the seed"):
        runs[0].wait()
    assert runs[1].wait().token_ids == []
    assert ask(other, PROMPT, seed=3).token_ids == alone


def test_what_was_drawn_outside_is_not_disturbed(serve: Any) -> None:
    for seed, draw in ((torch.manual_seed, DRAWS["torch"]), (random.seed, DRAWS["python"])):
        seed(5)
        expected = [draw() for _ in range(5)]
        seed(5)
        engine = serve(drawing(draw))
        ask(engine, PROMPT, temperature=1.0)
        engine.close()
        assert [draw() for _ in range(5)] == expected


LOADED = threading.Event()
WEIGHTS: list[float] = []


def load_drawing() -> dict[str, Any]:
    hook = drawing(DRAWS["torch"], after_each=lambda i: LOADED.wait(0.02))
    return {"model": LLAMA, "tokenizer": byte_tokenizer(), "generate": hook}


def load_random() -> dict[str, Any]:
    """A loader that begins its weights from a seed."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    WEIGHTS.append(float(torch.rand(1)) + float(torch.rand(1)))
    LOADED.set()
    return {"model": LLAMA, "tokenizer": byte_tokenizer(), "generate": at_once(DRAWS["numpy"])}


def test_loading_another_model_changes_no_seed_and_its_own_seed_holds() -> None:
    async def main() -> None:
        models = [{"id": name, "loader": f"{__name__}:load_{name}"} for name in ("drawing", "random")]
        host = ModelHost(parse_args({"models": models, "max_models_per_replica": 2}), "cpu")
        params = SamplingParams(seed=7, temperature=1.0, max_tokens=200)
        call = GenerateCall(request_id="a", model="drawing", prompts=(TextPrompt(text="Hi"),), sampling=params)

        async def tokens() -> list[int]:
            found: list[int] = []
            async for event in host.generate(call):
                assert not isinstance(event, Failed), event
                found.extend(event.token_ids if isinstance(event, Delta) else ())
            return found

        LOADED.set()
        alone = await tokens()
        LOADED.clear()
        beside, _ = await asyncio.gather(tokens(), host.load("random"))
        assert beside == alone
        await host.close()

    asyncio.run(main())
    torch.manual_seed(0)
    assert WEIGHTS[-1] == float(torch.rand(1)) + float(torch.rand(1))


def load_noisy() -> dict[str, Any]:
    """An encoder that draws, and seeds the process."""

    def encode(prompt: str) -> Any:
        torch.manual_seed(0)
        random.random()
        return byte_tokenizer()(prompt)

    return {**load_random(), "encode": encode}


def test_other_hooks_that_draw_take_turns_as_well() -> None:
    async def main() -> None:
        models = [{"id": name, "loader": f"{__name__}:load_{name}"} for name in ("drawing", "noisy")]
        host = ModelHost(parse_args({"models": models, "max_models_per_replica": 2}), "cpu")
        await host.load("noisy")
        torch.manual_seed(5)
        before = torch.get_rng_state()
        await host.render("noisy", TextPrompt(text="Hi"))
        assert torch.equal(torch.get_rng_state(), before)
        await host.close()

    asyncio.run(main())


def test_a_function_is_found_to_draw() -> None:
    assert all(RANDOM_STATE.draws(draw, 1.0) for draw in DRAWS.values())
    assert not RANDOM_STATE.draws(lambda: byte_tokenizer().encode("a text"), 1.0)
