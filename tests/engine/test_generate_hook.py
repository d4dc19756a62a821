from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deployments.engine.one_shot import OneShotEngine
from deployments.engine.options import EngineOptions
from deployments.errors import ModelError, OutOfMemory, UnsupportedParameter
from model_loaders.contract import ModelInfo
from tests.engine.drive import ask, greedy, start
from tests.tiny import byte_tokenizer, llama

LLAMA = llama()
PROMPT = list(b"goodbye")
EXPECTED = greedy(LLAMA, PROMPT, 12)
NO_EOS = 1 << 30
assert not {257, 260} & set(EXPECTED)


def build(hook: Callable[..., Any], *, model: Any = LLAMA, **kwargs: Any) -> OneShotEngine:
    info = ModelInfo(model=model, tokenizer=byte_tokenizer(), generate=hook, **kwargs)
    return OneShotEngine(info, EngineOptions())


@pytest.fixture
def serve() -> Any:
    engines = []

    def make(hook: Callable[..., Any], **kwargs: Any) -> OneShotEngine:
        engines.append(build(hook, **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(timeout=1.0)


def wrapper(**kwargs: Any) -> torch.Tensor:
    """What most loaders write."""
    kwargs.setdefault("eos_token_id", NO_EOS)
    found: torch.Tensor = LLAMA.generate(**kwargs, pad_token_id=0)
    return found


class TestCall:
    def test_gives_what_it_names_and_no_more(self, serve: Any) -> None:
        seen = []

        def hook(input_ids: torch.Tensor, max_new_tokens: int, temperature: float) -> torch.Tensor:
            seen.append((input_ids, max_new_tokens, temperature))
            return torch.cat([input_ids, torch.tensor([[65, 66]])], dim=1)

        engine = serve(hook)
        run = ask(engine, PROMPT, max_tokens=9, temperature=0.7)
        assert (run.tokens, run.finish_reason) == ([65, 66], "stop")
        ids, limit, temperature = seen[0]
        assert ids.tolist() == [PROMPT]
        assert (limit, temperature) == (9, 0.7)
        assert ask(engine, PROMPT, temperature=0.0).tokens == [65, 66]
        assert seen[1][2] == 0.0

    def test_gives_settings_under_transformers_names(self, serve: Any) -> None:
        seen: dict[str, Any] = {}

        def hook(**kwargs: Any) -> torch.Tensor:
            seen.update(kwargs)
            return kwargs["input_ids"]

        engine = serve(hook, generate_kwargs={"do_sample": True, "top_k": 3, "penalty_alpha": 0.6})
        ask(
            engine,
            PROMPT,
            max_tokens=4,
            temperature=0.5,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.2,
            min_tokens=2,
            num_beams=3,
            extra={"own": "thing", "top_p": 0.8},
            model_inputs={"pixel_values": torch.ones(1, 3)},
        )
        expected = {
            "max_new_tokens": 4,
            "temperature": 0.5,
            "do_sample": True,
            "top_k": 3,
            "top_p": 0.8,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "min_new_tokens": 2,
            "num_beams": 3,
            "penalty_alpha": 0.6,
            "own": "thing",
        }
        assert {key: seen.get(key) for key in expected} == expected
        assert seen["attention_mask"].tolist() == [[1] * len(PROMPT)]
        assert seen["pixel_values"].shape == (1, 3)

    def test_greedy_wins_over_the_loaders_sampling(self, serve: Any) -> None:
        engine = serve(wrapper, generate_kwargs={"do_sample": True, "temperature": 3.0})
        assert ask(engine, PROMPT, max_tokens=12).tokens == EXPECTED

    def test_request_values_never_leak_into_the_loaders_kwargs(self, serve: Any) -> None:
        kwargs = {"do_sample": True}
        engine = serve(wrapper, generate_kwargs=kwargs)
        ask(engine, PROMPT, max_tokens=2)
        assert kwargs == {"do_sample": True}

    def test_named_settings_that_transformers_lacks(self, serve: Any) -> None:
        seen = {}

        def hook(input_ids: torch.Tensor, presence_penalty: float) -> torch.Tensor:
            seen["presence"] = presence_penalty
            return input_ids

        engine = serve(hook)
        ask(engine, PROMPT, presence_penalty=0.5)
        assert seen == {"presence": 0.5}

    @pytest.mark.parametrize(
        "kwargs", [{"logprobs": 1}, {"frequency_penalty": 0.1}, {"logit_bias": {1: 1.0}}, {"prompt_logprobs": 0}]
    )
    def test_what_a_hook_cannot_honour_is_refused(self, serve: Any, kwargs: dict[str, Any]) -> None:
        engine = serve(wrapper)
        with pytest.raises(UnsupportedParameter, match=next(iter(kwargs))):
            start(engine, PROMPT, **kwargs)

    def test_what_a_hook_does_not_name_is_refused(self, serve: Any) -> None:
        engine = serve(lambda input_ids, max_new_tokens: input_ids)
        with pytest.raises(UnsupportedParameter, match="top_p"):
            start(engine, PROMPT, top_p=0.5)


class TestResult:
    @pytest.mark.parametrize(
        "shape",
        [
            lambda ids, new: torch.cat([ids, new], dim=1),
            lambda ids, new: torch.cat([ids, new], dim=1)[0],
            lambda ids, new: new,
            lambda ids, new: torch.cat([ids, new], dim=1).tolist(),
            lambda ids, new: type("Output", (), {"sequences": torch.cat([ids, new], dim=1)})(),
        ],
    )
    def test_prompt_and_text_or_text_alone(self, serve: Any, shape: Any) -> None:
        engine = serve(lambda input_ids: shape(input_ids, torch.tensor([[65, 66, 67]])))
        assert ask(engine, PROMPT).text == byte_tokenizer().decode([65, 66, 67])

    @pytest.mark.parametrize("returned", [None, "text", torch.ones(2, 3, dtype=torch.long), torch.ones(1, 3)])
    def test_anything_else_is_named(self, serve: Any, returned: Any) -> None:
        engine = serve(lambda input_ids: returned)
        with pytest.raises(ModelError, match="Hook generate returned"):
            ask(engine, PROMPT)

    def test_stop_strings_terminators_and_lengths(self, serve: Any) -> None:
        text = byte_tokenizer().decode(EXPECTED)
        engine = serve(wrapper)
        run = ask(engine, PROMPT, max_tokens=12, stop=(text[5:7],))
        assert run.text == text[: text.index(text[5:7])]
        assert run.finish_reason == "stop"
        assert ask(engine, PROMPT, max_tokens=12).finish_reason == "length"
        ended = ask(engine, PROMPT, max_tokens=12, stop_token_ids=(EXPECTED[4],))
        assert (ended.tokens, ended.deltas[-1].stop_reason) == (
            EXPECTED[: EXPECTED.index(EXPECTED[4]) + 1],
            EXPECTED[4],
        )


class TestLive:
    def test_streams(self, serve: Any) -> None:
        engine = serve(wrapper)
        run = ask(engine, PROMPT, max_tokens=12, stop=("no such text",))
        assert run.tokens == EXPECTED
        assert len([d for d in run.deltas if d.token_ids]) > 6

    def test_a_hook_without_a_streamer_answers_at_the_end(self, serve: Any) -> None:
        engine = serve(lambda input_ids, max_new_tokens: wrapper(input_ids=input_ids, max_new_tokens=max_new_tokens))
        assert ask(engine, PROMPT, max_tokens=12).tokens == EXPECTED

    def test_kwargs_that_lead_nowhere(self, serve: Any) -> None:
        def inner(input_ids: torch.Tensor, max_new_tokens: int, **kwargs: Any) -> torch.Tensor:
            if unknown := kwargs.keys() & {"streamer", "stopping_criteria"}:
                raise TypeError(f"inner() got an unexpected keyword argument '{min(unknown)}'")
            return torch.cat([input_ids, torch.tensor([[65]])], dim=1)

        engine = serve(lambda **kwargs: inner(**kwargs))
        assert ask(engine, PROMPT).tokens == [65]
        assert ask(engine, PROMPT).tokens == [65]

    def test_cancel_ends_the_hook(self, serve: Any) -> None:
        ended = threading.Event()

        def hook(**kwargs: Any) -> torch.Tensor:
            try:
                return wrapper(**kwargs)
            finally:
                ended.set()

        engine = serve(hook)
        run = start(engine, PROMPT, max_tokens=480)
        run.next()
        engine.cancel(run.request_id)
        assert ended.wait(2.0)
        assert engine.stats().generated_tokens < 400

    def test_a_stop_string_ends_a_hook_that_only_streams(self, serve: Any) -> None:
        made = []

        def hook(input_ids: torch.Tensor, max_new_tokens: int, streamer: Any) -> torch.Tensor:
            streamer.put(input_ids)
            for i in range(max_new_tokens):
                made.append(i)
                streamer.put(torch.tensor([65 + i]))
            streamer.end()
            raise AssertionError("not reached")

        text = byte_tokenizer().decode([67])
        run = ask(serve(hook), PROMPT, max_tokens=20, stop=(text,))
        assert (run.tokens, run.finish_reason, len(made)) == ([65, 66, 67], "stop", 3)

    def test_what_was_streamed_counts(self, serve: Any) -> None:
        def hook(input_ids: torch.Tensor, streamer: Any) -> torch.Tensor:
            streamer.put(torch.tensor([65]))
            return torch.cat([input_ids, torch.tensor([[90, 91]])], dim=1)

        assert ask(serve(hook), PROMPT).tokens == [65]


class TestSeeds:
    def test_same_seed_same_text(self, serve: Any) -> None:
        engine = serve(wrapper)
        texts = [ask(engine, PROMPT, temperature=1.0, seed=seed).tokens for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_no_seed_fresh_text_and_the_global_numbers_are_left_alone(self, serve: Any) -> None:
        engine = serve(wrapper)
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        assert ask(engine, PROMPT, temperature=1.0).tokens != ask(engine, PROMPT, temperature=1.0).tokens
        engine.close()
        assert torch.equal(torch.rand(3), expected)


class TestFailures:
    def test_a_hook_that_raises_fails_that_request_alone(self, serve: Any) -> None:
        def hook(input_ids: torch.Tensor) -> torch.Tensor:
            if input_ids[0, 0] == 1:
                raise RuntimeError("bad day")
            if input_ids[0, 0] == 2:
                raise torch.OutOfMemoryError("no memory")
            return torch.cat([input_ids, torch.tensor([[65]])], dim=1)

        engine = serve(hook)
        runs = [start(engine, [first, 7]) for first in (3, 1, 2, 3)]
        assert runs[0].result().tokens == runs[3].result().tokens == [65]
        assert isinstance(runs[1].wait().error, ModelError)
        assert "bad day" in runs[1].error.message
        assert isinstance(runs[2].wait().error, OutOfMemory)
        engine.check()

    def test_gradients_are_off_but_can_be_had(self, serve: Any) -> None:
        seen = []

        def hook(input_ids: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_grad_enabled())
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                (x * 2).backward()
            return input_ids

        ask(serve(hook), PROMPT)
        assert seen == [False]

    def test_a_hook_that_never_returns_does_not_stop_close(self) -> None:
        released = threading.Event()
        engine = build(lambda input_ids: (released.wait(20), input_ids)[1])
        run = start(engine, PROMPT)
        time.sleep(0.1)
        begun = time.monotonic()
        engine.close(timeout=0.2)
        assert time.monotonic() - begun < 8
        assert run.wait().error is not None
        released.set()

    def test_without_a_transformers_model(self, serve: Any) -> None:
        def echo(input_ids: torch.Tensor) -> torch.Tensor:
            return torch.cat([input_ids, input_ids], dim=1)

        engine = serve(echo, model=lambda: None)
        assert ask(engine, PROMPT).tokens == PROMPT
