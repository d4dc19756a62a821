"""Part `inside`: captured and changed states against the model alone, what they cost, and that graphs stay."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_requests import Client, Engine, random_prompts
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from deployments.core.calls import Capture, Intervention, Vector
from deployments.core.events import EngineEvent, Recorded
from deployments.engine.inside.recording import Recording
from gpu_parts.right import generated
from gpu_parts.setting import Mark, Measured, Setting
from tests.engine.architectures import decoder

LENGTHS = (5, 33, 1, 70, 12, 50)
EVERY = Capture(modules=("hidden_states",), positions="all")
LAST = Capture(modules=("model.layers.1",), positions="generated")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize")

Asked = Mapping[str, Any]


@dataclass
class Inspected(Client):
    """A client that keeps what was captured for it."""

    recording: Recording | None = None

    def emit(self, event: EngineEvent) -> None:
        if isinstance(event, Recorded):
            self.recording = event.recording
        super().emit(event)

    @property
    def states(self) -> Mapping[str, Tensor]:
        assert self.recording is not None
        return self.recording.tensors()


def inside(setting: Setting) -> Measured:
    """Small models against themselves, then the cost for a large one."""
    figures: dict[str, Any] = {}
    marks = [_captured(setting, torch.float32, 1e-4), _captured(setting, torch.bfloat16, 3e-2), _steered(setting)]
    model = setting.model(setting.models[0])
    rows, new = setting.sized(16, 4), setting.sized(64, 12)
    prompts = random_prompts(random.Random(3), rows, setting.sized(100, 8), model.config.vocab_size)
    marks += _beside_graphs(setting, model, prompts, new)
    marks += _cost(setting, model, prompts, new, figures)
    left = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    marks.append(setting.mark("modules with hooks when nobody asks", len(left), "0", not left))
    return figures, marks


def _run(engine: Engine, prompts: Sequence[list[int]], new: int, asked: Sequence[Asked] = ()) -> list[Inspected]:
    """Requests at once, the first ones with fields of their own."""
    clients = [
        engine.start(ids, new, client=Inspected(), **(asked[i] if i < len(asked) else {}))
        for i, ids in enumerate(prompts)
    ]
    for client in clients:
        client.wait()
    return clients


def _captured(setting: Setting, dtype: torch.dtype, bound: float) -> Mark:
    """Hidden states of prompts of several lengths in one batch, against one forward for each alone."""
    model = decoder("llama").to(setting.device, dtype)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 150) for _ in range(length)] for length in LENGTHS]
    engine = setting.engine(model, len(prompts))
    clients = _run(engine, prompts, 12, [{"capture": EVERY}] * len(prompts))
    engine.close()
    worst = 0.0
    for ids, client in zip(prompts, clients, strict=True):
        text = torch.tensor([[*ids, *client.tokens][:-1]], device=setting.device)
        with torch.inference_mode():
            alone = model(text, output_hidden_states=True, use_cache=False).hidden_states
        for layer, state in enumerate(alone):
            worst = max(worst, _far(client.states[f"hidden_states.{layer}"].float(), state[0].float().cpu()))
    name = f"{str(dtype).removeprefix('torch.')}: captured states, difference for each unit of the largest"
    return setting.mark(name, worst, f"at most {bound:g}", worst <= bound)


def _far(found: Tensor, alone: Tensor) -> float:
    if found.shape != alone.shape:
        return float("inf")
    return float((found - alone).abs().max() / alone.abs().max().clamp(min=1))


def _steered(setting: Setting) -> Mark:
    """Texts under a vector at every block, against `generate` with torch hooks that add it."""
    model = decoder("llama").to(setting.device)
    numbers = torch.linspace(-1, 1, model.config.hidden_size)
    vector = Vector(data=numbers.numpy().tobytes(), shape=tuple(numbers.shape))
    steering: Asked = {"interventions": (Intervention(module="model.layers.*", op="add", vector=vector),)}
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 150) for _ in range(length)] for length in LENGTHS]
    engine = setting.engine(model, len(prompts))
    texts = [client.tokens for client in _run(engine, prompts, 24, [steering] * 3)]
    engine.close()
    plain = [generated(model, ids, 24) for ids in prompts[3:]]
    moved = numbers.to(setting.device)
    hooks = [layer.register_forward_hook(lambda module, args, output: output + moved) for layer in model.model.layers]
    try:
        steered = [generated(model, ids, 24) for ids in prompts[:3]]
    finally:
        for hook in hooks:
            hook.remove()
    differing = [i for i, (text, other) in enumerate(zip(texts, steered + plain, strict=True)) if text != other]
    name = "steered and plain texts of a batch that differ from generate with torch hooks"
    return setting.mark(name, differing, "none", not differing)


def _beside_graphs(setting: Setting, model: Any, prompts: Sequence[list[int]], new: int) -> list[Mark]:
    """One inspected request beside others: these are captured and replayed as they are without it."""
    with setting.fixed() as made:
        engine = setting.engine(model, len(prompts))
        _run(engine, prompts[1:], new)
        captured, counts = made[-1].captured, [made[-1].repeated]
        for asked, ids in (([], prompts[1:]), ([{"capture": LAST}], prompts)):
            _run(engine, ids, new, asked)
            counts.append(made[-1].repeated)
        engine.close()
    captures, reason = made[-1].captured - captured, made[-1].reason
    replays = [counts[1] - counts[0], counts[2] - counts[1]]
    # How the prompts come together differs by a step or two from run to run.
    near = abs(replays[0] - replays[1]) <= 3
    return [
        setting.mark("captures because of an inspected request", captures, "at most 1", captures <= 1),
        setting.mark("steps of a fixed shape without and beside it", replays, "equal but for 3", near),
        setting.mark("why there are no graphs", reason, "None", reason is None),
    ]


def _cost(setting: Setting, model: Any, prompts: Sequence[list[int]], new: int, figures: dict[str, Any]) -> list[Mark]:
    """Ordinary steps with and without captured states: their time, and how often the host waits for the device."""
    engine = setting.engine(model, len(prompts))
    every = Capture(modules=("hidden_states",), positions="generated")
    numbers = torch.full((model.config.hidden_size,), 1e-3)
    vector = Vector(data=numbers.numpy().tobytes(), shape=tuple(numbers.shape))
    steering = Intervention(module="model.layers.*", op="add", vector=vector)
    cases: dict[str, list[Asked]] = {
        "nobody": [],
        "one, one module": [{"capture": LAST}],
        "all, all hidden states": [{"capture": every}] * len(prompts),
        "one steered at all blocks": [{"interventions": (steering,)}],
    }
    taken = {
        name: setting.median(lambda asked=asked: _run(engine, prompts, new, asked), 3, 1)
        for name, asked in cases.items()
    }
    waits = {
        name: _waits(setting, lambda asked=asked: _run(engine, prompts, new, asked)) for name, asked in cases.items()
    }
    engine.close()
    figures["ms a step"] = {name: 1000 * seconds / new for name, seconds in taken.items()}
    figures["waits of the host"] = waits
    marks = []
    for name, bound in (
        ("one, one module", 1.05),
        ("all, all hidden states", 1.10),
        ("one steered at all blocks", 1.05),
    ):
        ratio = taken[name] / taken["nobody"]
        marks.append(setting.timed(f"{name}: time against nobody", ratio, f"at most {bound:g}", ratio <= bound))
        more = waits[name] - waits["nobody"]
        # What the hooks do in each of the steps would show as one wait a step.
        marks.append(setting.timed(f"{name}: more waits of the host", more, f"below {new // 2}", more < new // 2))
    return marks


def _waits(setting: Setting, call: Any) -> int:
    """How often the host waits for the device in a call; 0 on a CPU."""
    if not setting.is_cuda:
        call()
        return 0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in found.key_averages() if event.key in _WAITS)
