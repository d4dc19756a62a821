from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from deployments.core.errors import ModelError, ModelLoadFailed, OutOfMemory, UnsupportedParameter
from deployments.engine.generate.engine import GenerateEngine
from model_loaders.contract import ModelInfo
from tests.engine.running import ask, built_engine, generate_engine, greedy, start
from tests.tiny import byte_tokenizer, llama

LLAMA = llama()
PROMPT = list(b"goodbye")
EXPECTED = greedy(LLAMA, PROMPT, 12)
NO_EOS = 1 << 30
assert not {257, 260} & set(EXPECTED)


def build(hook: Callable[..., Any], *, model: Any = LLAMA, **kwargs: Any) -> GenerateEngine:
    info = ModelInfo(model=model, tokenizer=byte_tokenizer(), generate=hook, **kwargs)
    return generate_engine(info)


@pytest.fixture
def serve() -> Any:
    engines = []

    def make(hook: Callable[..., Any], **kwargs: Any) -> GenerateEngine:
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


class Echo(torch.nn.Module):
    """Generates its prompt again."""

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        return torch.cat([input_ids, input_ids[:, :max_new_tokens]], dim=1)


class RemoteEcho(PreTrainedModel):
    """The same as remote code that does not inherit `GenerationMixin`."""

    config_class = PretrainedConfig
    generate = Echo.generate

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.head = torch.nn.Linear(2, 2)


class TestCall:
    def test_gives_what_it_names_and_no_more(self, serve: Any) -> None:
        seen = []

        def hook(input_ids: torch.Tensor, max_new_tokens: int, temperature: float) -> torch.Tensor:
            seen.append((input_ids, max_new_tokens, temperature))
            return torch.cat([input_ids, torch.tensor([[65, 66]])], dim=1)

        engine = serve(hook)
        run = ask(engine, PROMPT, max_tokens=9, temperature=0.7)
        assert (run.token_ids, run.finish_reason) == ([65, 66], "stop")
        ids, limit, temperature = seen[0]
        assert ids.tolist() == [PROMPT]
        assert (limit, temperature) == (9, 0.7)
        assert ask(engine, PROMPT, temperature=0.0).token_ids == [65, 66]
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
            inputs={"pixel_values": torch.ones(1, 3)},
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
        assert ask(engine, PROMPT, max_tokens=12).token_ids == EXPECTED

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
    def test_what_a_hook_cannot_honor_is_refused(self, serve: Any, kwargs: dict[str, Any]) -> None:
        engine = serve(wrapper)
        with pytest.raises(UnsupportedParameter, match=next(iter(kwargs))):
            start(engine, PROMPT, **kwargs)

    def test_what_a_hook_does_not_name_is_refused(self, serve: Any) -> None:
        engine = serve(lambda input_ids, max_new_tokens: input_ids)
        with pytest.raises(UnsupportedParameter, match="top_p"):
            start(engine, PROMPT, top_p=0.5)


NEW = torch.tensor([[65, 66, 67]])


def after(ids: torch.Tensor, new: torch.Tensor = NEW) -> torch.Tensor:
    return torch.cat([ids, new.to(ids.dtype)], dim=1)


def with_other_beginning(ids: torch.Tensor) -> torch.Tensor:
    """A hook that writes a beginning-of-sequence token of its own in place of the prompt's first."""
    return after(torch.cat([torch.tensor([[256]]), ids[:, 1:]], dim=1))


class TestResult:
    @pytest.mark.parametrize(
        "shape",
        [
            after,
            with_other_beginning,
            lambda ids: after(ids).tolist(),
            lambda ids: after(ids).int(),
            lambda ids: after(ids).numpy(),
            lambda ids: type("Output", (), {"sequences": after(ids)})(),
            lambda ids: ModelOutput(sequences=after(ids)),
            lambda ids: {"sequences": after(ids)},
        ],
    )
    def test_the_prompt_and_then_the_new_tokens(self, serve: Any, shape: Any) -> None:
        engine = serve(lambda input_ids: shape(input_ids))
        assert ask(engine, PROMPT).text == byte_tokenizer().decode([65, 66, 67])

    def test_no_new_tokens(self, serve: Any) -> None:
        run = ask(serve(lambda input_ids: input_ids), PROMPT)
        assert (run.token_ids, run.finish_reason) == ([], "stop")

    @pytest.mark.parametrize(
        ("shape", "said"),
        [
            (lambda ids: None, "returned NoneType; expected whole numbers of shape (1, n): the prompt's 7 tokens"),
            (lambda ids: "text", "returned str"),
            (lambda ids: after(ids)[0], "returned torch.int64 of shape (10,)"),
            (lambda ids: after(ids)[None], "of shape (1, 1, 10)"),
            (lambda ids: after(ids).float(), "returned torch.float32 of shape (1, 10)"),
            (lambda ids: after(ids).bool(), "returned torch.bool"),
            (lambda ids: after(ids).repeat(2, 1), "of shape (2, 10)"),
            (lambda ids: ModelOutput(logits=after(ids)), "returned ModelOutput with keys logits"),
            (lambda ids: {"tokens": after(ids)}, "returned dict with keys tokens"),
            (lambda ids: {}, "returned dict with keys (none)"),
            (lambda ids: [[1, 2], [3]], "returned list"),
            (lambda ids: NEW, "returned 3 tokens"),
            (lambda ids: NEW.repeat(1, 4), "returned 12 tokens that do not begin with the prompt"),
            (lambda ids: after(ids)[:, 1:], "do not begin with the prompt"),
            (lambda ids: after(ids, torch.full((1, 17), 65)), "returned 24 tokens; expected"),
            (
                lambda ids: after(ids, torch.tensor([[65, 99999]])),
                "the token id 99999; expected the model's ids 0 to 260",
            ),
            (lambda ids: after(ids, torch.tensor([[65, -100]])), "the token id -100"),
        ],
    )
    def test_anything_else_is_named(self, serve: Any, shape: Any, said: str) -> None:
        engine = serve(lambda input_ids, max_new_tokens: shape(input_ids))
        with pytest.raises(ModelError, match="Hook generate returned") as refused:
            ask(engine, PROMPT)
        assert said in str(refused.value)
        assert refused.value.code == "model_error"

    def test_a_hook_that_is_not_told_the_limit_is_cut_at_it(self, serve: Any) -> None:
        run = ask(serve(lambda input_ids: after(input_ids)), PROMPT, max_tokens=2)
        assert (run.token_ids, run.finish_reason) == ([65, 66], "length")

    def test_an_encoder_decoders_result_begins_with_the_decoders_start(self, serve: Any) -> None:
        class Config:
            is_encoder_decoder = True

        model = type("Model", (), {"config": Config(), "__call__": lambda self: None})()
        found = [torch.tensor([[0, 65, 66]]), torch.tensor([[]], dtype=torch.long)]
        engine = serve(lambda input_ids, max_new_tokens: found.pop(0), model=model)
        assert ask(engine, PROMPT).token_ids == [65, 66]
        with pytest.raises(ModelError, match=r"returned 0 tokens; .* 1 decoder token"):
            ask(engine, PROMPT)

    @pytest.mark.parametrize(
        "value",
        [torch.tensor([99999]), torch.tensor([-1]), torch.tensor([0.5]), torch.ones(2, 3, dtype=torch.long), "x"],
    )
    def test_what_is_streamed_is_checked_as_well(self, serve: Any, value: Any) -> None:
        def hook(input_ids: torch.Tensor, streamer: Any) -> torch.Tensor:
            streamer.put(input_ids)
            streamer.put(torch.tensor([65]))
            streamer.put(value)
            return after(input_ids)

        with pytest.raises(ModelError, match="Hook generate streamed"):
            ask(serve(hook), PROMPT)

    def test_new_tokens_streamed_with_a_batch_dimension(self, serve: Any) -> None:
        def hook(input_ids: torch.Tensor, streamer: Any) -> torch.Tensor:
            for token in NEW[0]:
                streamer.put(token[None, None])
            return after(input_ids)

        assert ask(serve(hook), PROMPT).token_ids == [65, 66, 67]

    def test_stop_strings_terminators_and_lengths(self, serve: Any) -> None:
        text = byte_tokenizer().decode(EXPECTED)
        engine = serve(wrapper)
        run = ask(engine, PROMPT, max_tokens=12, stop=(text[5:7],))
        assert run.text == text[: text.index(text[5:7])]
        assert run.finish_reason == "stop"
        assert ask(engine, PROMPT, max_tokens=12).finish_reason == "length"
        ended = ask(engine, PROMPT, max_tokens=12, stop_token_ids=(EXPECTED[4],))
        assert (ended.token_ids, ended.deltas[-1].stop_reason) == (
            EXPECTED[: EXPECTED.index(EXPECTED[4]) + 1],
            EXPECTED[4],
        )


class TestLive:
    def test_streams(self, serve: Any) -> None:
        engine = serve(wrapper)
        run = ask(engine, PROMPT, max_tokens=12, stop=("no such text",))
        assert run.token_ids == EXPECTED
        assert len([d for d in run.deltas if d.token_ids]) > 6

    def test_a_hook_without_a_streamer_answers_at_the_end(self, serve: Any) -> None:
        engine = serve(lambda input_ids, max_new_tokens: wrapper(input_ids=input_ids, max_new_tokens=max_new_tokens))
        assert ask(engine, PROMPT, max_tokens=12).token_ids == EXPECTED

    def test_kwargs_that_lead_nowhere(self, serve: Any) -> None:
        def inner(input_ids: torch.Tensor, max_new_tokens: int, **kwargs: Any) -> torch.Tensor:
            if unknown := kwargs.keys() & {"streamer", "stopping_criteria"}:
                raise TypeError(f"inner() got an unexpected keyword argument '{min(unknown)}'")
            return torch.cat([input_ids, torch.tensor([[65]])], dim=1)

        engine = serve(lambda **kwargs: inner(**kwargs))
        assert ask(engine, PROMPT).token_ids == [65]
        assert ask(engine, PROMPT).token_ids == [65]

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
        assert (run.token_ids, run.finish_reason, len(made)) == ([65, 66, 67], "stop", 3)

    def test_what_was_streamed_counts(self, serve: Any) -> None:
        def hook(input_ids: torch.Tensor, streamer: Any) -> torch.Tensor:
            streamer.put(torch.tensor([65]))
            return torch.cat([input_ids, torch.tensor([[90, 91]])], dim=1)

        assert ask(serve(hook), PROMPT).token_ids == [65]


class TestSeeds:
    def test_same_seed_same_text(self, serve: Any) -> None:
        engine = serve(wrapper)
        texts = [ask(engine, PROMPT, temperature=1.0, seed=seed).token_ids for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_no_seed_fresh_text_and_the_global_numbers_are_left_alone(self, serve: Any) -> None:
        engine = serve(wrapper)
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        assert ask(engine, PROMPT, temperature=1.0).token_ids != ask(engine, PROMPT, temperature=1.0).token_ids
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
        assert runs[0].wait().token_ids == runs[3].wait().token_ids == [65]
        assert isinstance(runs[1].end().error, ModelError)
        assert "bad day" in runs[1].error.message
        assert isinstance(runs[2].end().error, OutOfMemory)
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
        assert run.end().error is not None
        released.set()

    def test_without_a_transformers_model(self, serve: Any) -> None:
        def echo(input_ids: torch.Tensor) -> torch.Tensor:
            return torch.cat([input_ids, input_ids], dim=1)

        engine = serve(echo, model=lambda: None)
        assert ask(engine, PROMPT).token_ids == PROMPT

    @pytest.mark.parametrize("make", [Echo, lambda: RemoteEcho(PretrainedConfig())])
    def test_a_generate_that_is_not_that_of_transformers_is_a_hook(self, serve: Any, make: Callable[[], Any]) -> None:
        model = make()
        assert ask(serve(model.generate, model=model), PROMPT).token_ids == PROMPT
        with pytest.raises(ModelLoadFailed, match=r'generate of its own.*"generate": model\.generate'):
            built_engine(ModelInfo(model=model, tokenizer=byte_tokenizer()))
