"""Models whose code nobody knows, which keep something on their modules beyond a length of an invented name.

The proof at load finds them out, and what serves them answers as `generate` does on a fresh model.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.generate.engine import GenerateEngine
from deployments.engine.verify.named_lengths import named_lengths, tried_lengths
from tests.engine.running import built_engine, generate_alone, model_info, prompt, start
from tests.tiny import llama

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Their code says past_key_values to the library, as such code does.
    pytest.mark.filterwarnings("ignore:.past_key_values.:FutureWarning"),
]

TOKENS = 12


class TidalConfig(LlamaConfig):
    """One field of its own."""

    model_type = "tidal"
    spring_tide: int = 48


class Tidal(LlamaForCausalLM):
    """Beyond the spring tide it reads its tokens louder, as far as the longest sequence of a forward goes."""

    config_class = TidalConfig

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        embedded = self.model.embed_tokens(input_ids) * self.loudness(past + input_ids.shape[1])
        kwargs.update(attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values)
        return super().forward(inputs_embeds=embedded, **kwargs)

    def loudness(self, length: int) -> float:
        return 1.0 if length <= self.config.spring_tide else 2.0


class Flood(Tidal):
    """It remembers the highest water."""

    mark = 0

    def loudness(self, length: int) -> float:
        self.mark = max(self.mark, length)
        return super().loudness(self.mark)


class Counter(Tidal):
    """It grows louder with every forward over something long, whatever that was."""

    waves = 0

    def loudness(self, length: int) -> float:
        self.waves += length > self.config.spring_tide
        return 1.0 + 0.5 * min(self.waves, 3)


class Anew(Tidal):
    """Its `generate` computes a text anew at the tide."""

    def prepare_inputs_for_generation(
        self, input_ids: Any, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        tide = self.config.spring_tide
        if past_key_values and input_ids.shape[1] > tide >= past_key_values.get_seq_length():
            past_key_values = None
            kwargs["next_sequence_length"] = None
        kwargs.update(past_key_values=past_key_values, attention_mask=attention_mask)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


class Swell(nn.Module):
    """A rotary embedding of another make: its wavelength follows the longest position it has ever seen."""

    def __init__(self, tide: int) -> None:
        super().__init__()
        self.tide, self.longest = tide, 0

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.longest = max(self.longest, int(position_ids.max()) + 1)
        base = 100.0 * max(1.0, self.longest / self.tide)
        angles = position_ids[..., None] / base ** (torch.arange(0, 12, 2) / 12)
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


class Swelling(Tidal):
    def __init__(self, config: TidalConfig) -> None:
        super().__init__(config)
        self.model.rotary_emb = Swell(config.spring_tide)

    def loudness(self, length: int) -> float:
        return 1.0


def tidal(kind: type[Tidal], tide: int) -> Any:
    settings = llama().config.to_dict()
    torch.manual_seed(0)
    config = TidalConfig(**{**settings, "model_type": "tidal", "spring_tide": tide, "max_position_embeddings": 1024})
    return kind(config).eval()


@pytest.mark.parametrize("tide", [48, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", [Tidal, Flood, Counter, Anew, Swelling])
def test_it_is_served_as_generate_answers(kind: type[Tidal], tide: int, caplog: pytest.LogCaptureFixture) -> None:
    lengths = (12, tide - 4, tide, 2 * tide, 20, tide + 1, tide - 8, 9)
    prompts = [prompt(i, length) for i, length in enumerate(lengths)]
    with caplog.at_level(logging.WARNING):
        engine = built_engine(model_info(tidal(kind, tide)), memory_gib=0.25, prefill_chunk=64)
    try:
        for together in (True, False):
            runs = [start(engine, ids, max_tokens=TOKENS, ignore_eos=True) for ids in prompts if together]
            for i, ids in enumerate(prompts):
                run = runs[i] if together else start(engine, ids, max_tokens=TOKENS, ignore_eos=True)
                alone = generate_alone(tidal(kind, tide), ids, TOKENS)
                assert run.wait().token_ids == alone.token_ids, f"after {len(ids)} tokens"
    finally:
        engine.close()
    if kind is Swelling:
        assert isinstance(engine, BatchingEngine)
        assert engine.capabilities.mixes
    if kind in (Flood, Counter, Anew):
        assert isinstance(engine, GenerateEngine)
        assert "generate engine" in caplog.text


def test_lengths_that_a_config_names() -> None:
    model = tidal(Tidal, 48)
    assert named_lengths(model, 1024) == [48]
    assert named_lengths(model, 2048) == [48, 1024]
    assert named_lengths(llama(), 512) == []
    model.config.tides = {"neap": 20, "spring": [30, 31.0, 2.5, True], "inner": {"reach": 5000}}
    assert named_lengths(model, 10_000) == [20, 30, 31, 48, 1024, 5000]
    assert tried_lengths(model, 1024) == [20, 30, 31, 48]
    model.config.tides = list(range(10, 200))
    tried = tried_lengths(model, 1024)
    assert len(tried) < 8
    assert (tried[0], tried[-1]) == (10, 199)
