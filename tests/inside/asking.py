"""Inspected requests to an engine, and what the stock model gives for the same tokens alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deployments.core.calls import Capture, Intervention, Vector
from deployments.core.events import EngineEvent, Recorded
from deployments.engine.base.protocol import Engine
from deployments.engine.inside.recording import Recording
from tests.engine.running import Answer, submit

_numbers = itertools.count()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Seen(Answer):
    """A request that also receives what was captured."""

    recording: Recording | None = None

    def emit(self, event: EngineEvent) -> None:
        if isinstance(event, Recorded):
            self.recording = event.recording
        else:
            super().emit(event)

    @property
    def tensors(self) -> dict[str, Tensor]:
        assert self.recording is not None
        return self.recording.tensors()

    @property
    def numbered(self) -> dict[str, list[int]]:
        assert self.recording is not None
        return {name: tensor.tolist() for name, tensor in self.recording.numbered().items()}


def start(engine: Engine, ids: Sequence[int], max_tokens: int = 6, **asked: Any) -> Seen:
    """Send a greedy request of just as many tokens."""
    answer = Seen(f"inside-{next(_numbers)}")
    submit(engine, ids, max_tokens, answer=answer, **asked)
    return answer


def ask(engine: Engine, ids: Sequence[int], max_tokens: int = 6, **asked: Any) -> Seen:
    """The same, once it has ended well."""
    answer = start(engine, ids, max_tokens, **asked)
    answer.wait()
    return answer


def capture(*modules: str, **fields: Any) -> Capture:
    return Capture(modules=modules, **fields)


def vector(numbers: Tensor) -> Vector:
    return Vector(data=numbers.float().numpy().tobytes(), shape=tuple(numbers.shape))


def change(module: str, op: Any, numbers: Tensor | None = None, **fields: Any) -> Intervention:
    return Intervention(module=module, op=op, vector=None if numbers is None else vector(numbers), **fields)


def states_alone(model: Any, ids: Sequence[int], **inputs: Any) -> list[Tensor]:
    """transformers' hidden states [tokens, width] of a text in one forward without a cache.

    Args:
        model: not that of an engine, whose forward may have hooks at this moment.
    """
    given = {"input_ids": torch.tensor([list(ids)]), **inputs}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given.pop("decoder_input_ids")
    with torch.inference_mode():
        output = model(**given, output_hidden_states=True, use_cache=False)
    states = output.decoder_hidden_states if model.config.is_encoder_decoder else output.hidden_states
    return [state[0] for state in states]


def far(found: Tensor, expected: Tensor) -> float:
    """The largest difference, for each unit of the largest value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    size = max(1.0, expected.float().abs().max().item())
    return (found.float() - expected.float()).abs().max().item() / size


def hooked(model: Any) -> list[str]:
    """The modules that have hooks of ours."""
    return [
        name
        for name, module in model.named_modules()
        for table in _HOOKS
        for hook in getattr(module, table).values()
        if hook.__module__.startswith("deployments.")
    ]
