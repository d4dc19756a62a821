"""Encoders that read pictures or sound: recordings of any length and padding, and how such a model is tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deployments.core.errors import BadRequest
from tests.engine.as_alone import AsAlone, Prompt, as_alone
from tests.engine.running import ask, built_engine, model_info, prompt, start
from tests.engine.zoo import ZOO
from tests.forms import some

pytestmark = pytest.mark.usefixtures("one_thread")

AXES = {"moonshine": 1, "speech_to_text": 1, "canary": 1, "speecht5": 1}
"""The axis of time of each type's recordings."""
SHARES = (1.0, 0.5, 0.8, 0.6)


def recordings(checks: AsAlone, name: str) -> list[Prompt]:
    """Prompts with recordings of several lengths."""
    prompts = checks.prompts((3, 5, 4, 7), media=True)
    axis = AXES[name]
    return [
        Prompt(p.ids, {k: v.narrow(axis, 0, int(v.shape[axis] * share)) for k, v in p.inputs.items()}, p.content_key)
        for p, share in zip(prompts, SHARES, strict=True)
    ]


@some("name", sorted(AXES), AXES.keys() - {"speecht5"})
def test_recordings_of_different_lengths_decode_together(name: str) -> None:
    with as_alone(ZOO[name]) as checks:
        assert checks.engine.stats().kind == "continuous_batching"
        checks.at_once(recordings(checks, name))
        checks.staggered(recordings(checks, name)[::-1])


@pytest.mark.parametrize("name", ["moonshine", "speech_to_text"])
def test_the_padding_of_a_recording_is_not_heard(name: str) -> None:
    with as_alone(ZOO[name]) as checks:
        prompts = []
        for i, p in enumerate(checks.prompts((3, 5, 4), media=True)):
            (recording,) = p.inputs.values()
            mask = torch.ones(recording.shape[:2], dtype=torch.long)
            mask[:, int(mask.shape[1] * SHARES[i]) :] = 0
            prompts.append(Prompt(p.ids, {**p.inputs, "attention_mask": mask}, p.content_key))
        checks.at_once(prompts)


@pytest.mark.parametrize("name", ["moonshine", "vision-encoder-decoder"])
def test_text_alone_is_the_clients_mistake(name: str) -> None:
    engine = built_engine(model_info(ZOO[name].build()), memory_gib=0.1)
    with pytest.raises(BadRequest, match="This model needs"):
        start(engine, prompt(0, 4))
    engine.close()


def test_the_loaders_encoder_makes_what_the_model_is_tried_with() -> None:
    lengths: list[int] = []

    def encode(text: str, audio: Any = None, sampling_rate: int = 0) -> dict[str, Any]:
        ids: dict[str, Any] = {"input_ids": [[5, 6]]}
        if audio is not None:
            lengths.append(len(audio[0] if isinstance(audio, list) else audio))
            ids["input_values"] = torch.randn((1, 3000), generator=torch.Generator().manual_seed(1))
        return ids

    info = model_info(ZOO["moonshine"].build())
    info.encode = encode
    engine = built_engine(info, memory_gib=0.1)
    assert engine.stats().kind == "continuous_batching"
    assert lengths
    assert set(lengths) == {16_000}
    engine.close()


def test_an_encoder_that_takes_nothing_that_is_tried_is_not_proved(caplog: pytest.LogCaptureFixture) -> None:
    model = ZOO["moonshine"].build()
    encoder = model.get_encoder()
    forward = encoder.forward

    def picky(input_values: torch.Tensor, **kwargs: Any) -> Any:
        if input_values.shape[1] != 4000:
            raise ValueError("the recording has 4000 samples")
        return forward(input_values, **kwargs)

    encoder.forward = picky
    engine = built_engine(model_info(model), memory_gib=0.1)
    assert "its encoder takes input_values" in caplog.text
    inputs = ZOO["moonshine"].inputs(3, 0)
    assert ask(engine, prompt(0, 3), max_tokens=3, ignore_eos=True, inputs=inputs).token_ids
    engine.close()
