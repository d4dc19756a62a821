"""What choosing tokens costs beside a step, for `bench_engine.py`."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from bench_baselines import synchronize

from deployments.core.calls import SamplingParams
from deployments.engine.sampling.sample import sample_batch
from deployments.engine.sampling.state import SequenceSampler

ROWS, VOCAB, WIDTH = 32, 128_256, 2048
"""Rows, and the head of a model of 1 B parameters."""

FLAT = "top_p 0.95, flat logits"

WISHES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_p 0.95, top_k 50": {"temperature": 0.7, "top_p": 0.95, "top_k": 50},
    "top_p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
    "top_p, penalty, 5 logprobs": {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1, "logprobs": 5},
    FLAT: {"temperature": 0.7, "top_p": 0.95},
}


def sampling(model: Any, arguments: Namespace, bytes_per_second: float) -> list[dict[str, Any]]:
    """Seconds of choosing a token for every row, against those of the logits alone (the head's matrix product)."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    head = torch.randn(VOCAB, WIDTH, device=device, dtype=dtype) * 0.05
    hidden = torch.randn(ROWS, WIDTH, device=device, dtype=dtype)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter

    def seconds(call: Callable[[], Any]) -> float:
        synchronize(arguments.device)
        start = clock()
        call()
        synchronize(arguments.device)
        return clock() - start

    results = []
    print(f"{ROWS} rows, {VOCAB} tokens{'':>6}{'ms':>9}{'of the head':>13}")
    with torch.inference_mode():
        flat = torch.nn.functional.linear(hidden, head) / 2
        # What a text leaves: some tokens far above the others.
        likely = torch.rand(ROWS, VOCAB, device=device).topk(64).indices
        raised = torch.linspace(10, 22, 64, device=device, dtype=dtype).expand(ROWS, 64)
        peaked = flat.scatter_add(1, likely, raised)
        for name, wish in WISHES.items():
            rows = [
                SequenceSampler(
                    SamplingParams(seed=i, **wish), range(300), eos_ids=frozenset(), vocab_size=VOCAB, device=device
                )
                for i in range(ROWS)
            ]
            product = partial(torch.nn.functional.linear, hidden, head)
            chosen = partial(sample_batch, flat if name == FLAT else peaked, rows)
            times = [(seconds(product), seconds(chosen)) for _ in range(2 + 2 * arguments.turns)][2:]
            share = median(after / before for before, after in times)
            results.append({"wish": name, "ms": 1e3 * median(after for _, after in times), "share": share})
            print(f"{name:<28}{results[-1]['ms']:>9.1f}{100 * share:>11.0f} %", flush=True)
    return results
