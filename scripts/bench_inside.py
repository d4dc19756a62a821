"""What capture and interventions cost a decode step, in processor time of one thread.

    python scripts/bench_inside.py [--tokens 48] [--runs 3]

Every case decodes the same 16 sequences: on a random Llama of 12 layers of 768 (88 M parameters without its embeddings)
and on the demo model. The cases take turns, and the median of the runs counts. The last case is the first once more:
it shows the noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import queue
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deployments.config.engine import EngineOptions
from deployments.core.calls import Capture, Intervention, SamplingParams, Vector
from deployments.core.events import Delta, EngineEvent, Failed, is_last
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.text.vocabulary import Vocabulary
from model_loaders.contract import ModelInfo
from model_loaders.demo import load_model
from model_loaders.prompts.hooks import Hooks

_ROWS = 16
_PROMPT = 24
_SETTLED = 3
"""Tokens that every sequence has when the clock begins."""

Case = Callable[[int], Mapping[str, Any]]
"""What each of the sequences asks for, by its number."""


def large() -> ModelInfo:
    """Random weights: the arithmetic is that of any weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    return ModelInfo(model=LlamaForCausalLM(config).eval(), tokenizer=load_model().tokenizer, decode=numbers)


def numbers(token_ids: torch.Tensor) -> str:
    """A text to which every token adds, so that every step gives every sequence an event."""
    return "".join(f"<{i}>" for i in token_ids.tolist())


def cases(width: int) -> dict[str, Case]:
    """The cases by name; the first one is what the others are compared with."""
    small = torch.full((width,), 1e-3).numpy().tobytes()
    steering = Intervention(module="**.layers.*", op="add", vector=Vector(data=small, shape=(width,)))
    one = Capture(modules=("model.layers.1",), positions="generated")
    every = Capture(modules=("hidden_states",), positions="generated")
    return {
        "nobody": lambda row: {},
        "1 of 16, one module": lambda row: {"capture": one} if row == 0 else {},
        "16 of 16, all hidden states": lambda row: {"capture": every},
        "1 of 16 steered at all layers": lambda row: {"interventions": (steering,)} if row == 0 else {},
        "nobody, again": lambda row: {},
    }


class Clock:
    """Processor time of the process while every sequence decodes, read in the engine's thread.

    Prefills, and the steps in which sequences join or leave, do not count.
    """

    def __init__(self, tokens: int) -> None:
        self._last = tokens - 1
        self._counts = [0] * _ROWS
        self._begun: tuple[float, list[int]] | None = None
        self.ended: queue.Queue[EngineEvent] = queue.Queue()
        self.step_ms = 0.0

    def emit(self, row: int, event: EngineEvent) -> None:
        if isinstance(event, Delta):
            self._counts[row] += len(event.token_ids)
            if self._begun is None and min(self._counts) >= _SETTLED:
                self._begun = time.process_time(), self._counts.copy()
            elif self._begun is not None and not self.step_ms and self._counts[row] >= self._last:
                since, counts = self._begun
                self.step_ms = 1000 * (time.process_time() - since) / (self._counts[row] - counts[row])
        if is_last(event):
            self.ended.put(event)


def decode(engine: BatchingEngine, case: Case, tokens: int) -> float:
    """Milliseconds of processor time of a step of all sequences."""
    clock = Clock(tokens)
    for row in range(_ROWS):
        ids = [3 + (7 * row + 11 * place) % 200 for place in range(_PROMPT)]
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, **case(row))
        request = EngineRequest(request_id=f"{id(clock)}-{row}", input_ids=ids, sampling=sampling)
        engine.submit(request, functools.partial(clock.emit, row))
    for _ in range(_ROWS):
        event = clock.ended.get(timeout=600)
        if isinstance(event, Failed):
            raise event.error
    return clock.step_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | case | ms a step | more |\n|---|---|---|---|")
    for name, info, tokens in (
        ("12 layers of 768", large(), options.tokens),
        ("the demo model, 4 layers of 192", dataclasses.replace(load_model(), decode=numbers), 8 * options.tokens),
    ):
        found = measured(info, tokens, options.runs)
        first = next(iter(found.values()))
        for case, cost in found.items():
            print(f"| {name} | {case} | {cost:.2f} | {100 * (cost / first - 1):+.1f} % |", flush=True)


def measured(info: ModelInfo, tokens: int, runs: int) -> dict[str, float]:
    """The median cost of each case, the cases taking turns."""
    engine = BatchingEngine(info, Vocabulary(Hooks(info)), EngineOptions(prefix_cache=False, memory_gib=1.0, threads=1))
    every = cases(info.model.config.hidden_size)
    costs: dict[str, list[float]] = {case: [] for case in every}
    try:
        decode(engine, every["nobody"], 2 * _SETTLED)
        for run in range(runs):
            # Forwards and backwards, so that a processor that slows down or speeds up is not taken for a case.
            for case in list(every)[:: -1 if run % 2 else 1]:
                costs[case].append(decode(engine, every[case], tokens))
    finally:
        engine.close()
    return {case: statistics.median(each) for case, each in costs.items()}


if __name__ == "__main__":
    main()
