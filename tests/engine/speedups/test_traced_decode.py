"""Traced decode steps: the bits of ordinary steps, without the model's Python."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.events import Delta, EngineEvent
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.batching import engine as batching
from deployments.engine.model.forward import Forward
from deployments.engine.model.patches import Patches
from deployments.engine.speedups.packed_linear import pack_linears
from deployments.engine.speedups.traced_decode import TracedDecode, traced_decode
from tests.engine.architectures import DECODERS, VISION, decoder
from tests.engine.running import generate_alone, prompt, running, submit
from tests.engine.stepped import Stepped

pytestmark = pytest.mark.usefixtures("one_thread")

Texts = dict[str, list[Any]]
_TRACED = ("llama", "qwen3_moe", "gpt_neox", "gemma", "deepseek_v3")
_ORDINARY = {
    "longcat_flash": "reads numbers of its tensors",  # which experts are chosen
    "falcon": "The size of tensor",  # its bias for the lengths is a constant in the trace
}


def decoded(model: Any, traced: bool, *, steps: Callable[[int], None] | None = None) -> tuple[Texts, TracedDecode]:
    """What five sequences, one of which comes later, get in one schedule: tokens and the bits of log-probabilities.

    Args:
        steps: called before each step.
    """
    stepped = Stepped(model, max_batch_size=6, prefill_chunk=32)
    decode = TracedDecode(stepped.loop.forward, settled=0)
    stepped.loop.replayed = decode if traced else None
    texts: Texts = {}

    def add(name: str, ids: list[int], tokens: int) -> None:
        def emit(event: EngineEvent) -> None:
            assert isinstance(event, Delta), event
            texts.setdefault(name, []).append((event.token_ids, event.logprobs))

        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=3)
        stepped.queue(EngineRequest(request_id=name, input_ids=ids, sampling=sampling), emit)

    for name, (length, tokens) in enumerate([(20, 60), (23, 40), (30, 20), (25, 50)]):
        add(str(name), prompt(name, length), tokens)
    count = 0
    with torch.inference_mode():
        while not stepped.loop.idle:
            if count == 15:
                add("late", prompt(9, 28), 30)
            if steps is not None:
                steps(count)
            stepped.loop.step()
            count += 1
    return texts, decode


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in _TRACED else pytest.mark.long)
        for kind in sorted(DECODERS.keys() - _ORDINARY)
    ],
)
def test_bits_are_those_of_ordinary_steps(kind: str) -> None:
    model = decoder(kind)
    ordinary, _ = decoded(model, False)
    texts, decode = decoded(model, True)
    assert texts == ordinary
    if kind in _TRACED:
        assert decode.reason is None
        assert (decode.traced, decode.repeated > 50) == (2, True)


@pytest.mark.parametrize("kind", _ORDINARY)
def test_what_cannot_be_traced_decodes_as_ever(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = decoder(kind)
    ordinary, _ = decoded(model, False)
    with caplog.at_level(logging.INFO):
        texts, decode = decoded(model, True)
    assert texts == ordinary
    assert _ORDINARY[kind] in str(decode.reason)
    assert "Decode steps are not traced: " in caplog.text
    assert "Traceback" not in caplog.text


def test_packed_weights() -> None:
    """In bfloat16, through the packed kernel; afterwards the modules have their forwards back."""
    model = decoder("llama").to(torch.bfloat16)
    with Patches() as patches:
        if not pack_linears(model, patches, True):
            pytest.skip("This processor has no packed kernel.")
        forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
        ordinary, _ = decoded(model, False)
        texts, decode = decoded(model, True)
        assert texts == ordinary
        assert (decode.reason, decode.traced) == (None, 2)
        assert forwards == {name: vars(module).get("forward") for name, module in model.named_modules()}


def test_no_python_of_the_model_runs() -> None:
    """After a trace, but for the steps that are compared: two of each number of sequences and magnitude of lengths."""
    model = decoder("llama")
    calls: list[int] = []
    seen = 0

    class Norm(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            calls.append(seen)
            output: torch.Tensor = super().forward(states)
            return output

    model.model.norm.__class__ = Norm

    def step(count: int) -> None:
        nonlocal seen
        seen = count

    _, decode = decoded(model, True, steps=step)
    quiet = set(range(seen)) - set(calls)
    assert decode.repeated > len(quiet) > 30


def test_positions_of_several_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    build, image, media = VISION["qwen2_vl"]
    model = build()
    ids = [*prompt(1, 5), *image, *prompt(2, 9)]
    made: list[TracedDecode] = []

    def make(forward: Forward, options: EngineOptions) -> TracedDecode:
        made.append(TracedDecode(forward, settled=0))
        return made[-1]

    monkeypatch.setattr(batching, "traced_decode", make)
    with running(model) as engine:
        seen = submit(engine, ids, 30, inputs=media(ids, 1), content_key="1")
        assert seen.wait().token_ids == generate_alone(model, ids, 30, **media(ids, 1)).token_ids
    assert made[0].reason is None
    assert made[0].repeated > 20


def test_hooks_that_come_later_are_called() -> None:
    model = decoder("llama")
    heard: list[int] = []

    def step(count: int) -> None:
        if count == 20:
            model.model.layers[0].register_forward_hook(lambda *_: heard.append(count))

    _, decode = decoded(model, True, steps=step)
    assert "forward hook" in str(decode.reason)
    assert len(heard) > 20


def test_a_trace_with_other_logits_is_the_last() -> None:
    """A number that Python has from the cache is a constant in a trace."""
    model = decoder("llama")

    class Biased(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            cache = next(value for value in kwargs.values() if hasattr(value, "get_seq_length"))
            start = int(cache.get_seq_length(1))
            places = torch.arange(start, start + hidden_states.shape[1])[:, None]
            return self.inner(hidden_states * (1 + places / 50), *args, **kwargs)

    model.model.layers[1].self_attn = Biased(model.model.layers[1].self_attn)
    ordinary, _ = decoded(model, False)
    texts, decode = decoded(model, True)
    assert texts == ordinary
    assert decode.reason == "their logits are not those of an ordinary step"


@pytest.mark.parametrize(
    ("options", "traced"),
    [({}, True), ({"trace_steps": False}, False), ({"deterministic": True}, False), ({"trace_steps": True}, True)],
)
def test_options(options: dict[str, Any], traced: bool) -> None:
    assert (traced_decode(Forward(decoder("llama")), EngineOptions(**options)) is not None) == traced


def test_windows_and_states_are_not_traced() -> None:
    assert traced_decode(Forward(decoder("mamba")), EngineOptions(trace_steps=True)) is None
