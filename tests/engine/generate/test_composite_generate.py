"""Models whose `generate` is their own: what it drops, renames or cannot do without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from deployments.core.errors import BadRequest, ModelError, ModelLoadFailed
from deployments.engine.base.protocol import Engine
from deployments.engine.generate.engine import GenerateEngine
from tests.engine.architectures import VISION
from tests.engine.as_alone import as_alone
from tests.engine.running import ask, built_engine, greedy, model_info, prompt, start
from tests.engine.zoo import ZOO
from tests.tiny import llama

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = prompt(1, 12)


def engine_of(model: Any, kind: Any = "generate", **options: Any) -> Engine:
    return built_engine(model_info(model), kind=kind, memory_gib=0.1, **options)


def counted(module: torch.nn.Module) -> list[int]:
    """A list that grows by one with every forward of a module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


class Drops(LlamaForCausalLM):  # type: ignore[misc]
    """Passes on neither the processors nor the criteria that it is given."""

    def generate(self, input_ids: Any = None, logits_processor: Any = None, **kwargs: Any) -> Any:
        return super().generate(input_ids, **kwargs)


class Renames(LlamaForCausalLM):  # type: ignore[misc]
    """Reads its limits under names of its own, and goes on to speak unless it is told not to."""

    def generate(
        self, input_ids: Any = None, thinker_max_new_tokens: int = 4, thinker_eos_token_id: int = 9, **kwargs: Any
    ) -> Any:
        assert kwargs.pop("generation_mode") == "text"
        kwargs.update(eos_token_id=thinker_eos_token_id, max_new_tokens=thinker_max_new_tokens)
        return super().generate(input_ids, **kwargs)


class Within(LlamaForCausalLM):  # type: ignore[misc]
    """Hands everything to a model inside, which has a generation_config of its own."""

    def generate(self, input_ids: Any = None, **kwargs: Any) -> Any:
        inner = copy.copy(self)
        inner.generation_config = copy.deepcopy(self.generation_config)
        inner.generation_config.update(repetition_penalty=1.8, eos_token_id=list(range(261)))
        return super(Within, inner).generate(input_ids, **kwargs)


class Never(LlamaForCausalLM):  # type: ignore[misc]
    """Asks nobody which token comes next."""

    def generate(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        if pixel_values is None:
            raise TypeError("missing 1 required positional argument: 'pixel_values'")
        return input_ids

    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


def as_kind(kind: type[Any]) -> Any:
    model = llama()
    model.__class__ = kind
    return model


class TestOwnGenerate:
    @pytest.mark.parametrize("kind", [Drops, Renames, Within])
    @pytest.mark.parametrize("beams", [1, 3])
    def test_text_is_that_of_a_plain_generate(self, kind: type[Any], beams: int) -> None:
        kwargs: dict[str, Any] = {} if beams == 1 else {"num_beams": beams}
        expected = greedy(llama(), IDS, 20, **kwargs)
        engine = engine_of(as_kind(kind))
        assert ask(engine, IDS, max_tokens=20, ignore_eos=True, **kwargs).token_ids == expected
        engine.close()

    def test_sequences_are_compared_with_it_too(self) -> None:
        engine = engine_of(as_kind(Drops), kind="auto")
        assert engine.stats().kind == "continuous_batching"
        engine.close()

    def test_one_that_asks_nobody_fails_the_request(self) -> None:
        engine = engine_of(as_kind(Never))
        with pytest.raises(ModelError, match="never asks"):
            ask(engine, IDS, inputs={"pixel_values": torch.ones(1, 3)})
        engine.close()

    def test_the_probe_ends_after_a_few_steps(self) -> None:
        model = ZOO["qwen3_omni_moe"].build()
        calls = counted(model.thinker)
        engine = engine_of(model, kind="auto")
        assert isinstance(engine, GenerateEngine)
        assert len(calls) < 60
        engine.close()


class TestNeededMedia:
    @pytest.mark.parametrize(
        ("name", "needed"),
        [("blip", "an image"), ("blip-2", "an image"), ("idefics", "an image"), ("moonshine", "a recording")],
    )
    def test_text_alone_is_the_clients_mistake(self, name: str, needed: str) -> None:
        specimen = ZOO[name]
        engine = engine_of(specimen.build(), kind="auto")
        with pytest.raises(BadRequest, match=f"This model needs {needed}") as caught:
            start(engine, IDS)
        assert caught.value.param == "prompt"
        assert ask(engine, IDS, max_tokens=3, inputs=specimen.inputs(len(IDS), 0), ignore_eos=True).token_ids
        engine.close()

    def test_a_model_of_images_that_fails_for_another_reason_does_not_load(self) -> None:
        model = ZOO["blip-2"].build()

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("expected scalar type Double but found Float")

        model.generate = broken
        with pytest.raises(ModelLoadFailed, match="expected scalar type"):
            engine_of(model, kind="auto")

    @pytest.mark.parametrize("kind", ["continuous_batching", "generate"])
    @pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_vl"])
    def test_more_placeholders_than_images_are_the_clients_mistake(self, name: str, kind: str) -> None:
        build, image, media = VISION[name]
        ids = [*image, *IDS, *image]
        engine = engine_of(build(), kind=kind)
        with pytest.raises(BadRequest, match="do not match its images"):
            ask(engine, ids, inputs=media(ids, 0))
        assert ask(engine, IDS, max_tokens=2).token_ids
        engine.close()

    def test_a_model_of_text_alone_that_fails_does_not_load(self) -> None:
        model = llama()

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise ValueError("no such kernel")

        model.forward = broken
        with pytest.raises(ModelLoadFailed, match="no such kernel"):
            engine_of(model)


def failing_once(model: Any, at: int) -> Callable[..., Any]:
    """A forward that fails once, at some call with more than one sequence."""
    forward, left = model.forward, [at]

    def fails(**kwargs: Any) -> Any:
        out = forward(**kwargs)
        left[0] -= len(out.logits) > 1
        if left[0] == 0:
            left[0] = -1
            raise RuntimeError("the device was lost")
        return out

    return fails


@pytest.mark.parametrize("name", ["fsmt", "unlimited_ocr", "t5gemma"])
def test_a_request_that_is_run_again_goes_on_as_if_nothing_had_happened(name: str) -> None:
    with as_alone(ZOO[name], kind="generate") as checks:
        model = checks.model
        model.forward = failing_once(model, 8)
        prompts = checks.prompts((40, 12), media=False)
        checks.at_once(prompts)
