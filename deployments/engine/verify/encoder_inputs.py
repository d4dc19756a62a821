"""Inputs for encoders that read pictures or sound, to try such a model with.

The loader's own processor makes them from a gray picture or a second of noise; without one they are random tensors of a
shape that the encoder takes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deployments.engine.base.text_side import TextSide

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Tensor]

_SAMPLES = 8000
_FRAMES = 128
_SHORTER = 0.75


def encoder_inputs(model: Any, text_side: TextSide | None = None) -> dict[str, Tensor]:
    """Tensors of one prompt, batch dimension 1; none for an encoder of tokens, or if it takes nothing that is tried."""
    main = str(model.main_input_name)
    if main == "input_ids" or not getattr(model.config, "is_encoder_decoder", False):
        return {}
    for inputs in (*_processed(text_side), *_drawn(model, main)):
        if main in inputs and _accepts(model, inputs):
            return dict(inputs)
    return {}


def shorter(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """The same recording cut off; nothing if the encoder takes only whole ones, or a picture."""
    main = inputs.get(str(model.main_input_name))
    if main is None or main.dim() > 3:
        return {}
    lengths = sorted(set(main.shape[1:]))
    axis = list(main.shape).index(lengths[-1], 1)
    whole = main.shape[axis]
    cut = {k: _cut(value, axis if value is main else -1, whole, int(whole * _SHORTER)) for k, value in inputs.items()}
    return cut if _accepts(model, cut) else {}


def _cut(value: Tensor, axis: int, whole: int, length: int) -> Tensor:
    return value.narrow(axis, 0, length) if value.dim() > 1 and value.shape[axis] == whole else value


def _processed(text_side: TextSide | None) -> Iterator[Inputs]:
    """What the loader's processor makes."""
    if text_side is None:
        return
    media: list[dict[str, Any]] = []
    if text_side.sees_images:
        from PIL import Image

        media.append({"images": [Image.new("RGB", (64, 64), (128, 128, 128))]})
    if text_side.hears:
        noise = torch.randn(int(text_side.audio_rate), generator=_generator())
        media.append({"audio": [(0.1 * noise).numpy()]})
    for given in media:
        for text in ("What is this?", ""):
            try:
                yield text_side.encode(text, **given).model_inputs
            except Exception as error:
                logger.debug("No input for the encoder: %s: %s", type(error).__name__, error)


def _drawn(model: Any, main: str) -> Iterator[Inputs]:
    """Random tensors of the shapes that configs name."""
    configs = [model.config, model.get_encoder().config]
    if main == "pixel_values":
        size = _named(configs, "image_size")
        for side in size:
            height, width = side if isinstance(side, (list, tuple)) else (side, side)
            for channels in (*_named(configs, "num_channels"), 3):
                yield {main: _random(1, channels, height, width)}
        return
    bins = _named(configs, "num_mel_bins", "input_feat_per_channel", "num_mel_channels")
    frames = [2 * n for n in _named(configs, "max_source_positions")]
    for count in dict.fromkeys([*frames, _FRAMES]):
        for size in bins if main != "input_values" else []:
            yield {main: _random(1, size, count)}
            yield {main: _random(1, count, size)}
    yield {main: _random(1, _SAMPLES)}


def _named(configs: list[Any], *names: str) -> list[Any]:
    return [value for config in configs for name in names if (value := getattr(config, name, None)) is not None]


def _accepts(model: Any, inputs: Inputs) -> bool:
    """Whether the encoder runs on it."""
    main = inputs[str(model.main_input_name)]
    device = next(iter(model.parameters())).device
    try:
        with torch.inference_mode():
            model.get_encoder()(main.to(device=device, dtype=model.dtype))
    except Exception:
        return False
    return True


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def encoder_needs(model: Any) -> str | None:
    """What every prompt of an encoder-decoder must have beside text, in words; None if its encoder reads text."""
    reads_text = not getattr(model.config, "is_encoder_decoder", False) or model.main_input_name == "input_ids"
    return None if reads_text else needed_media(model)


def needed_media(model: Any) -> str | None:
    """What a model that refuses text alone reads beside it, in words; None if it reads text alone."""
    names = {str(model.main_input_name), *inspect.signature(model.forward).parameters}
    if any("pixel" in name for name in names):
        return "an image"
    if any(name.startswith(("input_features", "input_values", "audio")) for name in names):
        return "a recording"
    others = names & {"inputs", "input_patches", "flattened_patches", "image_patches", "protein_input_ids"}
    return f"the input {min(others)!r}" if others else None
