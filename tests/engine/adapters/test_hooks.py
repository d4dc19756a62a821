"""Adapters over a model whose loader has a generate hook."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.adapters.lora_file import read_lora
from deployments.core.errors import ModelError
from deployments.engine.generate.engine import GenerateEngine
from tests.adapters.lora import merged, write_adapter
from tests.engine.running import generate_engine, greedy, model_info, prompt, submit
from tests.tiny import llama

IDS = prompt(0, 9)
TOKENS = 6


def engine_of(hook: Callable[..., Any], model: Any, folder: Path) -> GenerateEngine:
    engine = generate_engine(model_info(model, generate=hook))
    engine.add_adapter("a", read_lora(folder))
    return engine


def ask(engine: GenerateEngine, adapter: str) -> list[int]:
    try:
        return submit(engine, IDS, TOKENS, adapter=adapter, ignore_eos=False).wait().token_ids
    finally:
        if adapter:
            engine.close(timeout=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(llama(), tmp_path / "a", ("q_proj", "up_proj"))


def test_a_hook_that_calls_the_model(folder: Path) -> None:
    model = llama()

    def generate(input_ids: torch.Tensor, max_new_tokens: int, streamer: Any) -> Any:
        return model.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)

    engine = engine_of(generate, model, folder)
    expected = [greedy(llama(), IDS, TOKENS), greedy(merged(llama(), folder, lambda name: 2.0), IDS, TOKENS)]
    assert [ask(engine, ""), ask(engine, "a")] == expected


@pytest.mark.parametrize("streams", [True, False])
def test_a_hook_that_calls_another_model(folder: Path, streams: bool) -> None:
    other = llama()

    def generate(input_ids: torch.Tensor, max_new_tokens: int, streamer: Any) -> Any:
        more = {"streamer": streamer} if streams else {}
        return other.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False, **more)

    engine = engine_of(generate, llama(), folder)
    assert len(ask(engine, "")) == TOKENS
    with pytest.raises(ModelError, match="has not used the adapter"):
        ask(engine, "a")


def test_a_hook_that_computes_in_another_thread(folder: Path) -> None:
    model = llama()

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> Any:
        found: list[Any] = []

        def work() -> None:
            found.append(model.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0]

    with pytest.raises(ModelError, match="has not used the adapter"):
        ask(engine_of(generate, model, folder), "a")
