"""What a loader offers for the inside of its model, checked when it loads: named vectors, and states for a callback."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from deployments.core.calls import Capture, SamplingParams
from deployments.core.errors import ModelLoadFailed, TroupeError, shown
from deployments.engine.base.protocol import Engine
from deployments.engine.batching.engine import BatchingEngine
from deployments.openai.fields.fields import bad_field
from deployments.openai.fields.inside import CaptureFields
from model_loaders.contract import ModelInfo

_LONG = 1 << 20


def read_vectors(info: ModelInfo) -> dict[str, torch.Tensor]:
    """The vectors of a loader, float32 [width] or [rows, width] on the CPU.

    Raises:
        ModelLoadFailed: one is not a tensor, or not the path of a file with one tensor, or not finite.
    """
    return {name: _vector(f"vectors[{name!r}]", given, info.label) for name, given in info.vectors.items()}


def _vector(place: str, given: Any, model: str) -> torch.Tensor:
    if isinstance(given, str | PathLike):
        if not Path(given).is_file():
            raise _wrong(model, place, f"{shown(str(given))}; no such file, expected one in safetensors format")
        try:
            tensors = load_file(given)
        except (SafetensorError, OSError) as error:
            raise _wrong(model, place, f"{shown(str(given))}, which is not in safetensors format: {error}") from error
        if len(tensors) != 1:
            raise _wrong(model, place, f"{shown(str(given))}, a file of {len(tensors)} tensors; expected one tensor")
        (given,) = tensors.values()
    try:
        vector = torch.as_tensor(given).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _wrong(model, place, f"{type(given).__name__}; expected a tensor or the path of one") from error
    if vector.dim() not in (1, 2) or not vector.numel():
        raise _wrong(model, place, f"a tensor of shape {list(vector.shape)}; expected [width], or [rows, width]")
    if not bool(vector.isfinite().all()):
        raise _wrong(model, place, "numbers that are not finite in float32")
    return vector


def inspected_states(info: ModelInfo) -> Capture | None:
    """What `done_callback` is shown of the model's states; None if nothing.

    Raises:
        ModelLoadFailed: `inspect` cannot be read, or there is no callback.
    """
    if not info.inspect:
        return None
    if info.done_callback is None:
        raise _wrong(info.label, "inspect", "states to show, and no done_callback that would see them; add one")
    given: Mapping[str, Any] = {
        key: list(value) if isinstance(value, tuple | range) else value for key, value in info.inspect.items()
    }
    try:
        return CaptureFields.model_validate(given).read()
    except ValidationError as error:
        raise _wrong(info.label, "inspect", f"{shown(dict(given))}. {bad_field(error).message}") from error


def check_inspected(info: ModelInfo, engine: Engine) -> None:
    """Refuse states that the model does not have.

    Raises:
        ModelLoadFailed: it names the pattern. The engine is closed.
    """
    wanted = inspected_states(info)
    if wanted is None:
        return
    reason = "" if isinstance(engine, BatchingEngine) else "Only continuous batching captures states; remove it."
    try:
        if isinstance(engine, BatchingEngine):
            engine.inside.inspected(SamplingParams(max_tokens=_LONG), _LONG, wanted)
    except TroupeError as error:
        reason = error.message
    if reason:
        engine.close(0.0)
        raise _wrong(info.label, "inspect", f"{shown(dict(info.inspect))}. {reason}")


def _wrong(model: str, place: str, found: str) -> ModelLoadFailed:
    end = "" if found.endswith(".") else "."
    return ModelLoadFailed(f"The loader of model {model!r} returned {place}: {found}{end}")
