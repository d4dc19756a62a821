"""What looking inside costs in a decode step: tensor operators, whose number does not follow that of the sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deployments.core.calls import SamplingParams
from deployments.core.events import Delta, EngineEvent
from deployments.engine.base.protocol import EngineRequest
from tests import tiny
from tests.engine.running import prompt
from tests.engine.stepped import Stepped
from tests.inside.asking import ask, capture, change, hooked
from tests.inside.test_capture import engine_of


class Operators(TorchDispatchMode):
    """Counts the operators of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(asked: dict[str, Any], inspected: int, sequences: int) -> int:
    """Operators of a decode step of a batch in which `inspected` sequences ask for something."""
    stepped = Stepped(tiny.llama(), max_batch_size=16, prefix_cache=False)
    events: list[EngineEvent] = []
    for number in range(sequences):
        sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        if number < inspected:
            sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, **asked)
        request = EngineRequest(request_id=f"{number}", input_ids=prompt(number, 6), sampling=sampling)
        stepped.queue(request, events.append)
    counts = []
    with torch.inference_mode():
        for _ in range(6):
            with Operators() as counted:
                stepped.loop.step()
            counts.append(counted.count)
    assert all(isinstance(event, Delta) for event in events)
    assert stepped.loop.stats().sequences == sequences
    # The first steps compute the prompts, and work out what holds for all others.
    assert len(set(counts[3:])) == 1, counts
    return counts[-1]


LAYERS = 2
CAPTURED = {"capture": capture("hidden_states", positions="all")}
STEERED = {"interventions": (change("model.layers.*", "add", torch.ones(48), positions="generated"),)}


@pytest.mark.parametrize(
    ("asked", "sites", "most"), [(CAPTURED, LAYERS + 1, 4), (STEERED, LAYERS, 2)], ids=["captured", "steered"]
)
def test_operators_do_not_follow_the_number_of_sequences(asked: dict[str, Any], sites: int, most: int) -> None:
    plain = operators({}, 0, 8)
    added = [operators(asked, inspected, 8) - plain for inspected in (1, 2, 5, 8)]
    assert 0 < max(added) <= most * sites, added
    assert added[0] == added[1] == added[2], added


def test_a_forward_in_which_nobody_is_inspected_meets_no_hook() -> None:
    model = tiny.llama()
    engine = engine_of(model)
    met: list[int] = []
    handle = model.model.norm.register_forward_hook(lambda *call: met.append(len(hooked(model))))
    ask(engine, prompt(1, 6), 4)
    assert set(met) == {0}
    met.clear()
    ask(engine, prompt(1, 6), 4, **CAPTURED)
    assert min(met) > 0
    handle.remove()
    engine.close()
