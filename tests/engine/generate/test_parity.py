"""The generate engine gives what `generate` gives alone, for models that depend on it and for others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from deployments.engine.generate.engine import GenerateEngine
from tests.engine.architectures import IMAGE_TOKEN, NOT_HELD, VISION, decoder, encoder_decoder, paligemma, whisper
from tests.engine.running import built_engine, generate_alone, model_info, prompt, start
from tests.forms import some

LENGTHS = (3, 40, 1, 17)


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_equal_alone(
    model: Any,
    prompts: Sequence[Sequence[int]],
    inputs: Sequence[Mapping[str, torch.Tensor]] | None = None,
    kind: Any = "generate",
) -> None:
    inputs = inputs or [{}] * len(prompts)
    # Each on a model of its own: some keep a state on their modules.
    expected = [
        generate_alone(copy.deepcopy(model), ids, 8, **given) for ids, given in zip(prompts, inputs, strict=True)
    ]
    engine = built_engine(model_info(model), kind=kind, memory_gib=0.1)
    assert isinstance(engine, GenerateEngine)
    runs = [
        start(engine, ids, max_tokens=8, ignore_eos=True, logprobs=0, inputs=given)
        for ids, given in zip(prompts, inputs, strict=True)
    ]
    for run, alone in zip(runs, expected, strict=True):
        assert run.wait().token_ids == alone.token_ids
        assert run.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    engine.close()


PROMPTS = [prompt(i, length) for i, length in enumerate(LENGTHS)]


# xlstm's own generate fails on a prompt of this size with the installed transformers.
@pytest.mark.parametrize("kind", sorted(NOT_HELD.keys() - {"xlstm"}))
def test_what_sequences_cannot_hold(kind: str) -> None:
    assert_equal_alone(decoder(kind, **NOT_HELD[kind]), PROMPTS, kind="auto")


@some("kind", ("gemma3_text", "deepseek_v3", "jamba", "gpt_oss", "bloom"), ("gemma3_text", "jamba"))
def test_decoder(kind: str) -> None:
    assert_equal_alone(decoder(kind), PROMPTS)


@some("kind", ("bart", "t5", "marian", "pegasus"), ("bart", "t5"))
def test_encoder_decoder(kind: str) -> None:
    assert_equal_alone(encoder_decoder(kind), PROMPTS)


@pytest.mark.parametrize("kind", sorted(VISION))
def test_vision(kind: str) -> None:
    build, image, media = VISION[kind]
    prompts = [[*ids, *image, 9] for ids in PROMPTS]
    assert_equal_alone(build(), [*prompts, *PROMPTS], [*(media(ids, i) for i, ids in enumerate(prompts)), *[{}] * 4])


def test_whisper() -> None:
    features = [torch.randn((1, 8, 60), generator=torch.Generator().manual_seed(i)) for i in range(len(PROMPTS))]
    assert_equal_alone(whisper(), PROMPTS, [{"input_features": spectrogram} for spectrogram in features])


def test_a_vision_model_whose_generate_is_not_its_forward() -> None:
    """PaliGemma counts positions from one, which the probe at load finds."""
    prompts = [[*[IMAGE_TOKEN] * 4, *ids] for ids in PROMPTS]
    media = [
        {
            "pixel_values": torch.randn((1, 3, 28, 28), generator=torch.Generator().manual_seed(i)),
            "token_type_ids": torch.zeros((1, len(ids)), dtype=torch.long),
        }
        for i, ids in enumerate(prompts)
    ]
    assert_equal_alone(paligemma(), prompts, media, kind="auto")
