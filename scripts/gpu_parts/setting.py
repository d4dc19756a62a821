"""What every part of `bench_gpu` shares: the device, sizes, clocks, marks, and the engine's steps of a fixed shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from bench_baselines import build_model
from bench_requests import Engine

from deployments.config.engine import EngineOptions
from deployments.engine.batching import engine as batching
from deployments.engine.model.forward import Forward
from deployments.engine.speedups.fixed_decode import Capture, CudaGraphs, FixedDecode, Run

Measured = tuple[dict[str, Any], list["Mark"]]


class Skipped(Exception):
    """A part that cannot be measured here; the message says why."""


@dataclass
class Mark:
    """A figure and what it should be.

    Attributes:
        passed: None if it is not judged: on a CPU no figure of time is.
    """

    name: str
    value: Any
    should: str
    passed: bool | None

    def shown(self) -> dict[str, Any]:
        value = f"{self.value:.4g}" if isinstance(self.value, float) else self.value
        return {"name": self.name, "value": value, "should": self.should, "passed": self.passed}


@dataclass(frozen=True)
class Part:
    """A part of the script.

    Attributes:
        measure: figures and marks, of a setting.
        seconds: when it is killed.
    """

    name: str
    measure: Callable[[Setting], Measured]
    seconds: float
    about: str


@dataclass
class Setting:
    """Where the measurements are made, and how large they are.

    Attributes:
        known: figures of the part `facts`, if it has run.
    """

    device: str
    tiny: bool
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def models(self) -> tuple[str, ...]:
        """Sizes of `bench_baselines`, one at a time on the device: 8 B in bfloat16 are 16 GB."""
        return ("tiny",) if self.tiny else ("1b", "8b")

    @property
    def rows(self) -> tuple[int, ...]:
        return (1, 3) if self.tiny else (1, 16, 64)

    @property
    def sized_columns(self) -> tuple[int, ...]:
        return (64,) if self.tiny else (512, 4096)

    @property
    def sized_prompts(self) -> tuple[int, ...]:
        return (16,) if self.tiny else (512, 2048)

    def sized(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def begin(self, known: dict[str, Any]) -> None:
        """In a part's process, before anything is measured."""
        self.known = known
        torch.manual_seed(0)
        torch.set_num_threads(1 if self.tiny else torch.get_num_threads())
        torch.backends.cuda.matmul.allow_tf32 = False
        if self.is_cuda:
            self._warm_up()

    def _warm_up(self) -> None:
        """A second of products: clocks rise from idle."""
        square = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            for _ in range(20):
                square @ square
            torch.cuda.synchronize()

    def card(self) -> dict[str, Any]:
        """The device and the most memory that the part has taken."""
        if not self.is_cuda:
            return {"card": "cpu"}
        try:
            taken = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            return {
                "card": torch.cuda.get_device_name(),
                "capability": torch.cuda.get_device_capability(),
                "cuda": torch.version.cuda,
                "peak_gb": taken[0] / 1e9,
                "peak_reserved_gb": taken[1] / 1e9,
            }
        except Exception as error:
            return {"card": f"unknown: {error}"}

    def mark(self, name: str, value: Any, should: str, passed: bool) -> Mark:
        """What must hold on every device."""
        return Mark(name, value, should, passed)

    def timed(self, name: str, value: float | None, should: str, passed: bool) -> Mark:
        """What is judged on a GPU alone."""
        return Mark(name, value, should, passed if self.is_cuda and not self.tiny else None)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def memory(self) -> int:
        return torch.cuda.memory_reserved() if self.is_cuda else 0

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, with what it has launched."""
        self.synchronize()
        begun = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - begun

    def median(self, call: Callable[[], Any], repeats: int = 30, warm: int = 3) -> float:
        """Seconds of a call, the median of several."""
        repeats, warm = (3, 1) if self.tiny else (repeats, warm)
        for _ in range(warm):
            call()
        return median(self.seconds(call) for _ in range(repeats))

    def model(self, size: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        return build_model(size, torch.float32 if self.tiny else dtype, self.device)

    def engine(self, model: Any, rows: int, **options: Any) -> Engine:
        """The engine over a model, by the names of `bench_requests`."""
        return Engine(model, self.arguments(rows), prefix_cache=False, **options)

    def arguments(self, rows: int) -> Any:
        """What the other benches take of their command lines."""

        class Arguments:
            device, dtype, clock, threads, turns = self.device, "bfloat16", "wall", None, 1 if self.tiny else 3
            memory_gib = None if self.is_cuda else 0.25

        Arguments.rows = [rows]  # type: ignore[attr-defined]
        return Arguments

    @property
    def capture(self) -> Capture:
        """CUDA graphs; on a CPU a step that is repeated as it is stands in for one."""
        return CudaGraphs() if self.is_cuda else stand_in

    @contextmanager
    def fixed(self, capture: Capture | None = None) -> Iterator[list[FixedDecode]]:
        """Engines that are built now decode in captured steps; the list has each engine's."""
        made: list[FixedDecode] = []
        original = batching.fixed_decode

        def make(forward: Forward, options: EngineOptions) -> FixedDecode:
            made.append(FixedDecode(forward, capture or self.capture, settled=4))
            return made[-1]

        batching.fixed_decode = make
        try:
            yield made
        finally:
            batching.fixed_decode = original


def stand_in(run: Run) -> Run:
    """A capture's place on a CPU."""
    run()
    return lambda: run()
