from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from deployments.engine import choice
from deployments.engine.choice import build_engine
from deployments.engine.one_shot import OneShotEngine
from deployments.engine.options import EngineOptions
from deployments.engine.protocol import Engine
from deployments.engine.row_engine import RowEngine
from deployments.errors import ModelLoadFailed
from model_loaders.contract import ModelInfo
from tests.engine.drive import ask, greedy
from tests.tiny import byte_tokenizer, llama

PROMPT = [72, 69, 76, 76, 79]


def build(model: Any = None, *, kind: Any = "auto", **kwargs: Any) -> Engine:
    info = ModelInfo(**{"model": model or llama(), "tokenizer": byte_tokenizer(), "model_name": "tiny", **kwargs})
    return build_engine(info, EngineOptions(kind=kind, memory_gib=0.1))


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
    def test_a_decoder_gets_rows(self, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
        engine = build(llama().to(dtype))
        assert isinstance(engine, RowEngine)
        assert not caplog.records
        engine.close()

    def test_the_probe_takes_no_time_on_a_small_model(self) -> None:
        begun = time.process_time()
        build().close()
        assert time.process_time() - begun < 3

    def test_rows_that_differ_from_generate_are_not_taken(self, caplog: pytest.LogCaptureFixture) -> None:
        model = shifted()
        with caplog.at_level(logging.WARNING):
            engine = build(model)
        assert isinstance(engine, OneShotEngine)
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "tiny" in caplog.text
        assert "differ from generate's" in caplog.text
        assert ask(engine, PROMPT, max_tokens=8, ignore_eos=True).tokens == greedy(model, PROMPT, 8)
        engine.close()

    def test_the_probe_would_pass_the_same_model_unshifted(self) -> None:
        engine = build(llama())
        assert isinstance(engine, RowEngine)
        engine.close()

    def test_a_model_rows_cannot_hold_is_served_all_the_same(self, caplog: pytest.LogCaptureFixture) -> None:
        from tests.engine.architectures import decoder

        model = decoder("openai-gpt")
        with caplog.at_level(logging.WARNING):
            engine = build(model, tokenizer=None, encode=lambda text: [[1]], decode=lambda ids: " ".join(map(str, ids)))
        assert isinstance(engine, OneShotEngine)
        assert len(caplog.records) == 1
        assert ask(engine, [5, 6, 7], max_tokens=6, ignore_eos=True).tokens == greedy(model, [5, 6, 7], 6)
        engine.close()

    def test_an_engine_that_fails_in_the_probe_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        closed = []

        class Broken(RowEngine):
            def submit(self, *args: Any) -> None:
                raise RuntimeError("no")

            def close(self, timeout: float = 30.0) -> None:
                closed.append(True)
                super().close(timeout)

        monkeypatch.setattr(choice, "RowEngine", Broken)
        engine = build()
        assert isinstance(engine, OneShotEngine)
        assert closed
        engine.close()

    def test_a_generate_hook_is_called(self) -> None:
        def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
            return torch.cat([input_ids, torch.full((1, max_new_tokens), 65)], dim=1)

        engine = build(generate=generate)
        assert ask(engine, PROMPT, max_tokens=3).tokens == [65] * 3
        engine.close()

    def test_the_models_own_generate_as_a_hook_is_no_hook(self) -> None:
        model = llama()
        engine = build(model, generate=model.generate)
        assert isinstance(engine, RowEngine)
        engine.close()


class TestKinds:
    def test_one_shot(self) -> None:
        engine = build(kind="one_shot")
        assert isinstance(engine, OneShotEngine)
        engine.close()

    def test_rows_without_the_comparison(self) -> None:
        engine = build(shifted(), kind="rows")
        assert isinstance(engine, RowEngine)
        engine.close()

    def test_rows_refuse_a_hook_and_a_model_they_cannot_hold(self) -> None:
        with pytest.raises(ModelLoadFailed, match="generate hook"):
            build(kind="rows", generate=lambda input_ids: input_ids)
        with pytest.raises(ModelLoadFailed, match="one_shot"):
            build(torch.nn.Linear(2, 2), kind="rows")

    def test_the_loaders_engine_always_wins(self) -> None:
        seen = []

        def engine(info: ModelInfo, options: EngineOptions) -> str:
            seen.append((info, options))
            return "mine"

        assert build(kind="rows", engine=engine) == "mine"  # type: ignore[comparison-overlap]
        assert seen[0][1].kind == "rows"
