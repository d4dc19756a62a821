"""The contenders of `bench_engine.py`'s comparisons, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from bench_baselines import Run, apart, bare_loop, build_model, continuous_batching, padded_generate
from bench_requests import Engine

# Else glibc gives freed tensors back to the system, and continuous batching takes up to 1.6 times as long.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Contender:
    """One way to compute texts, ready to run. Alone in its process, as torch's idle threads slow other ones down.

    Args:
        name: of `WAYS`.
        arguments: of the benchmark.
        options: of the way.
    """

    def __init__(self, name: str, arguments: Namespace, **options: Any) -> None:
        self._name = name
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, name, arguments, options), daemon=True)
        os.environ.update(ALLOCATOR)
        self._process.start()
        theirs.close()
        self._receive()

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, list[float]]:
        """Seconds that `new` tokens after each prompt took, and of each decode step if they are known."""
        self._pipe.send((prompts, new))
        taken: tuple[float, list[float]] = self._receive()
        return taken

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit(f"The process of {self._name} has ended.") from None


def _work(pipe: Connection, name: str, arguments: Namespace, options: dict[str, Any]) -> None:
    """Compute what comes through the pipe until it is closed."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    clock = CLOCKS[arguments.clock]
    dtype = getattr(torch, arguments.dtype)
    model = apart(partial(build_model, arguments.model, dtype, arguments.device))
    with WAYS[name](model, arguments, **options) as (run, steps):
        pipe.send(None)
        while True:
            try:
                prompts, new = pipe.recv()
            except EOFError:
                return
            start = clock()
            run(prompts, new)
            pipe.send((clock() - start, steps()))


@contextmanager
def _engine(model: Any, arguments: Namespace, **options: Any) -> Iterator[tuple[Run, Callable[[], list[float]]]]:
    engine = Engine(model, arguments, prefix_cache=False, **options)
    yield engine.run, lambda: engine.steps
    engine.close()


@contextmanager
def _stock(
    make: Callable[[Any, str], Run], model: Any, arguments: Namespace
) -> Iterator[tuple[Run, Callable[[], list[float]]]]:
    yield make(model, arguments.device), list


@contextmanager
def _batching(model: Any, arguments: Namespace, **sizes: int) -> Iterator[tuple[Run, Callable[[], list[float]]]]:
    with continuous_batching(model, **sizes) as run:
        yield run, list


WAYS: dict[str, Callable[..., Any]] = {
    "engine": _engine,
    "deterministic": partial(_engine, deterministic=True),
    "loop": partial(_stock, bare_loop),
    "generate": partial(_stock, padded_generate),
    "cb": _batching,
}
"""Context managers of a model's run, and of what gives the seconds of its last decode steps."""
