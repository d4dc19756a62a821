"""An engine whose building fails midway leaves the model as it was, and so does one that closes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deployments.config.engine import EngineOptions
from deployments.core.errors import ModelLoadFailed
from deployments.engine.build import build_engine
from model_loaders.prompts.hooks import Hooks
from tests.engine.running import model_info
from tests.tiny import llama


class Signs(nn.Linear):
    """A linear of one bit per weight, as a checkpoint's code brings it: no kernel multiplies by such a weight."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight = nn.Parameter(plain.weight.detach() > 0, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) * 2 - 1)


def half_of_one_bit() -> Any:
    model = llama(tie_word_embeddings=False).to(torch.bfloat16)
    model.lm_head = Signs(model.lm_head)
    return model


def build(model: Any, **options: Any) -> Any:
    info = model_info(model)
    return build_engine(info, EngineOptions(memory_gib=0.25, **options), Hooks(info))


def test_a_build_that_fails_leaves_the_model_as_it_was() -> None:
    model = half_of_one_bit()
    before = dict(model.named_parameters())
    values = {name: value.float() for name, value in before.items()}
    with pytest.raises(ModelLoadFailed, match="cannot have engine kind"):
        build(model, kind="continuous_batching", deterministic=True, pack_linears=True, max_batch_size=4)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(parameter.float(), values[name]) for name, parameter in model.named_parameters())


def test_closing_an_engine_leaves_the_model_as_it_was() -> None:
    model = llama(tie_word_embeddings=False).to(torch.bfloat16)
    before = dict(model.named_parameters())
    engine = build(model, kind="continuous_batching", deterministic=True, pack_linears=True, max_batch_size=4)
    engine.close(5.0)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
