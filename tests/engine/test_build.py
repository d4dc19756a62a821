from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor

from deployments.config.engine import EngineOptions
from deployments.core.errors import ModelLoadFailed
from deployments.engine import build as choice
from deployments.engine.base.protocol import Engine
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.generate.engine import GenerateEngine
from deployments.engine.verify import parity
from deployments.engine.verify.parity import image_prompt
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks
from tests.engine.architectures import llava
from tests.engine.running import ask, built_engine, greedy
from tests.tiny import byte_tokenizer, llama

PROMPT = [72, 69, 76, 76, 79]


def build(model: Any = None, *, kind: Any = "auto", **kwargs: Any) -> Engine:
    info = ModelInfo(**{"model": model or llama(), "tokenizer": byte_tokenizer(), "model_name": "tiny", **kwargs})
    return built_engine(info, kind=kind, memory_gib=0.1)


class Shifted(LlamaForCausalLM):
    """Its `generate` gives positions that a plain forward does not."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] * 3 + 1
        return inputs


def shifted() -> Shifted:
    model = Shifted(llama().config).eval()
    model.load_state_dict(llama().state_dict())
    return model


class TestAuto:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_decoder_gets_sequences(self, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
        engine = build(llama().to(dtype))
        assert isinstance(engine, BatchingEngine)
        assert not caplog.records
        engine.close()

    def test_tokens_that_the_embedding_lacks_are_named(self, caplog: pytest.LogCaptureFixture) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["<new>", "<newer>"])
        build(tokenizer=tokenizer).close()
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith("Model tiny has 261 tokens, and its tokenizer 2 more, such as '<new>' (261)")

    def test_a_slow_machine_compares_fewer_prompts_and_keeps_its_sequences(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(parity, "PATIENCE", 0.0)
        engine = build()
        assert isinstance(engine, BatchingEngine)
        assert not caplog.records
        engine.close()

    def test_sequences_that_differ_from_generate_are_not_taken(self, caplog: pytest.LogCaptureFixture) -> None:
        model = shifted()
        with caplog.at_level(logging.WARNING):
            engine = build(model)
        assert isinstance(engine, GenerateEngine)
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "tiny" in caplog.text
        assert "differ from generate's" in caplog.text
        assert ask(engine, PROMPT, max_tokens=8, ignore_eos=True).token_ids == greedy(model, PROMPT, 8)
        engine.close()

    def test_the_probe_would_pass_the_same_model_unshifted(self) -> None:
        engine = build(llama())
        assert isinstance(engine, BatchingEngine)
        engine.close()

    def test_a_model_sequences_cannot_hold_is_served_all_the_same(self, caplog: pytest.LogCaptureFixture) -> None:
        from tests.engine.architectures import decoder

        model = decoder("openai-gpt")
        with caplog.at_level(logging.WARNING):
            engine = build(model, tokenizer=None, encode=lambda text: [[1]], decode=lambda ids: " ".join(map(str, ids)))
        assert isinstance(engine, GenerateEngine)
        assert len(caplog.records) == 1
        assert ask(engine, [5, 6, 7], max_tokens=6, ignore_eos=True).token_ids == greedy(model, [5, 6, 7], 6)
        engine.close()

    def test_an_engine_that_fails_in_the_probe_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        closed = []

        class Broken(BatchingEngine):
            def submit(self, *args: Any) -> None:
                raise RuntimeError("no")

            def close(self, timeout: float = 30.0) -> None:
                closed.append(True)
                super().close(timeout)

        monkeypatch.setattr(choice, "BatchingEngine", Broken)
        engine = build()
        assert isinstance(engine, GenerateEngine)
        assert closed
        engine.close()

    def test_a_generate_hook_is_called(self) -> None:
        def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
            return torch.cat([input_ids, torch.full((1, max_new_tokens), 65)], dim=1)

        engine = build(generate=generate)
        assert ask(engine, PROMPT, max_tokens=3).token_ids == [65] * 3
        engine.close()

    def test_the_models_own_generate_as_a_hook_is_no_hook(self) -> None:
        model = llama()
        engine = build(model, generate=model.generate)
        assert isinstance(engine, BatchingEngine)
        engine.close()


class Forgetful(LlavaForConditionalGeneration):
    """It keeps what it has seen last on the module: right by itself, wrong for an image beside others."""

    seen: Any = None

    def forward(
        self, input_ids: Any = None, pixel_values: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        if not past_key_values.get_seq_length():
            self.seen = None if pixel_values is None else pixel_values.mean()
        kwargs = {**kwargs, "pixel_values": pixel_values, "past_key_values": past_key_values}
        output = super().forward(input_ids=input_ids, **kwargs)
        if self.seen is not None:
            output.logits[..., 7] += 20 * self.seen
        return output


class TestImages:
    @staticmethod
    def loaded(kind: type[LlavaForConditionalGeneration], **kwargs: Any) -> dict[str, Any]:
        """A vision model with its processor, as a loader returns them."""
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        pixels = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor = LlavaProcessor(
            pixels, tokenizer, patch_size=14, num_additional_image_tokens=1, vision_feature_select_strategy="default"
        )
        model = llava(vocab_size=264, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), kind=kind)
        return {"model": model, "processor": processor, "tokenizer": tokenizer, **kwargs}

    def test_the_probe_shows_an_image(self) -> None:
        info = ModelInfo(**self.loaded(LlavaForConditionalGeneration))
        [prompt] = image_prompt(Hooks(info))
        assert prompt.input_ids.count(info.model.config.image_token_id) == 4
        assert prompt.model_inputs["pixel_values"].shape == (1, 3, 28, 28)
        assert prompt.content_key
        engine = built_engine(info, memory_gib=0.1)
        assert isinstance(engine, BatchingEngine)
        engine.close()

    def test_a_template_writes_the_images_place(self) -> None:
        template = "{% for p in messages[0]['content'] %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}!"
        info = ModelInfo(**self.loaded(LlavaForConditionalGeneration, chat_template=template))
        [prompt] = image_prompt(Hooks(info))
        assert prompt.input_ids[-1] == info.tokenizer.convert_tokens_to_ids("!")

    @pytest.mark.filterwarnings("ignore:.past_key_values.:FutureWarning")
    def test_a_model_that_is_wrong_with_images_only_gets_no_sequences(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            engine = build(**self.loaded(Forgetful))
        assert isinstance(engine, GenerateEngine)
        assert "differ from generate's" in caplog.text
        engine.close()
        without_eyes = build(**self.loaded(Forgetful, processor=None))
        assert isinstance(without_eyes, BatchingEngine)
        without_eyes.close()


class TestKinds:
    def test_generate(self) -> None:
        engine = build(kind="generate")
        assert isinstance(engine, GenerateEngine)
        engine.close()

    def test_sequences_without_the_comparison(self) -> None:
        engine = build(shifted(), kind="continuous_batching")
        assert isinstance(engine, BatchingEngine)
        engine.close()

    def test_sequences_refuse_a_hook_and_a_model_they_cannot_hold(self) -> None:
        with pytest.raises(ModelLoadFailed, match="generate hook"):
            build(kind="continuous_batching", generate=lambda input_ids: input_ids)
        with pytest.raises(ModelLoadFailed, match="generate"):
            build(torch.nn.Linear(2, 2), kind="continuous_batching")

    def test_the_loaders_engine_always_wins(self) -> None:
        seen = []

        def engine(info: ModelInfo, options: EngineOptions) -> str:
            seen.append((info, options))
            return "mine"

        assert build(kind="continuous_batching", engine=engine) == "mine"  # type: ignore[comparison-overlap]
        assert seen[0][1].kind == "continuous_batching"
