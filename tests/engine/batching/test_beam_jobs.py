"""Beam searches in the engine that batches; tests/openai/fields/test_beams.py compares their texts."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from deployments.core.errors import BadRequest, ModelError, Unavailable, UnsupportedParameter
from tests.engine.architectures import decoder
from tests.engine.running import batching_engine, generate_alone, prompt, submit


@pytest.fixture(scope="module")
def model() -> Any:
    return decoder("llama")


def expected(model: Any, ids: list[int], beams: int) -> list[int]:
    found = model.generate(
        torch.tensor([ids]), num_beams=beams, max_new_tokens=6, do_sample=False, eos_token_id=1 << 40
    )
    return list(found[0, len(ids) :].tolist())


@pytest.mark.parametrize("kind", ["llama", "mamba2", "gemma3_text"])
def test_a_search_beside_other_texts(kind: str) -> None:
    model = decoder(kind)
    engine = batching_engine(model)
    texts = [submit(engine, prompt(i, 9), 12) for i in range(3)]
    searches = [submit(engine, prompt(i, 7), 6, num_beams=3) for i in range(3)]
    for i in range(3):
        assert texts[i].wait().token_ids == generate_alone(model, prompt(i, 9), 12).token_ids
        assert searches[i].wait().token_ids == expected(model, prompt(i, 7), 3)
    engine.close(5)


def test_one_name_runs_once(model: Any) -> None:
    engine = batching_engine(model)
    for first, second in ((1, 2), (2, 1), (2, 2)):
        running = submit(engine, prompt(0, 4), 200, name="same", num_beams=first)
        with pytest.raises(BadRequest, match="already running"):
            submit(engine, prompt(0, 4), 4, name="same", num_beams=second)
        running.wait()
    submit(engine, prompt(0, 4), 4, name="same", num_beams=2).wait()
    engine.close(5)


def test_what_does_not_go_with_a_search_is_refused(model: Any) -> None:
    engine = batching_engine(model)
    for setting in ({"top_p": 0.5}, {"prompt_logprobs": 1}, {"logprobs": 1}):
        with pytest.raises(UnsupportedParameter) as refused:
            submit(engine, prompt(0, 4), 4, name="again", num_beams=2, **setting)
        assert refused.value.param == next(iter(setting))
    submit(engine, prompt(0, 4), 4, name="again", num_beams=2).wait()
    engine.close(5)


def test_a_search_that_fails_fails_alone(model: Any) -> None:
    engine = batching_engine(model)
    submit(engine, prompt(0, 4), 4, num_beams=2).wait()

    def broken(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] == 3:
            raise RuntimeError("no such kernel")

    with model.register_forward_pre_hook(broken, with_kwargs=True):
        search, text = submit(engine, prompt(0, 4), 4, num_beams=3), submit(engine, prompt(0, 4), 4)
        with pytest.raises(ModelError, match="no such kernel"):
            search.wait()
        text.wait()
    engine.close(5)


def test_an_engine_that_closes_ends_its_searches(model: Any) -> None:
    engine = batching_engine(model)
    begun = threading.Event()
    handle = model.register_forward_pre_hook(lambda *_: begun.set())
    searches = [submit(engine, prompt(i, 4), 400, num_beams=2) for i in range(3)]
    assert begun.wait(30)
    engine.close(0)
    handle.remove()
    for search in searches:
        with pytest.raises(Unavailable):
            search.wait()
