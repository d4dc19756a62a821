"""A simulated model: it takes the time of a large model without computing, to try out the serving of a cluster.

The time of a step follows from a roofline (Williams et al., 2009): decoding reads all weights and the caches of all
rows from memory once, prefill multiplies every prompt token with all weights. Models of one process take turns on its
device. Answers are the words `word0 word1 …`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from typing import Any

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.events import Delta
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import Emit, EngineRequest, EngineStats
from deployments.engine.base.threaded import ThreadedEngine
from deployments.engine.batching.sequence import common_prefix
from model_loaders.contract import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What a step costs. The defaults are an 8 B model in bf16 (Llama 3.1: 32 layers, 8 KV heads of 128) on an H200.

    Attributes:
        weight_bytes: of the model.
        cache_bytes: of a token's keys and values: 2 * 32 * 8 * 128 * 2.
        bandwidth: bytes per second; 4.8 TB/s, of which two thirds are reached.
        flops: per second; 990 TFLOP/s, of which 40 % are reached.
        slowdown: all times are multiplied by it, so that few cores can serve many simulated GPUs.
    """

    weight_bytes: float = 16e9
    cache_bytes: float = 131072
    bandwidth: float = 3.2e12
    flops: float = 4e14
    slowdown: float = 1.0

    def decode(self, tokens: int) -> float:
        """Seconds of a step over sequences of `tokens` tokens in all."""
        return self.slowdown * (self.weight_bytes + tokens * self.cache_bytes) / self.bandwidth

    def prefill(self, tokens: int) -> float:
        """Seconds for `tokens` prompt tokens; two operations per weight of two bytes and token."""
        return self.slowdown * tokens * self.weight_bytes / self.flops


class Device:
    """The device of the models of a process. It computes one step at a time, in the order of the requests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0

    def book(self, earliest: float, seconds: float) -> float:
        """The end of a step that begins at `earliest` or later; times of `time.monotonic()`."""
        with self._lock:
            self._free_at = max(self._free_at, earliest) + seconds
            return self._free_at


_DEVICE = Device()


@dataclass(slots=True)
class _Row:
    live: LiveRequest
    said: int = 0
    cached: int = 0


class SimulatedEngine(ThreadedEngine):
    """Continuous batching with a prefix store, in time only. See `protocol.Engine`."""

    kind = "simulated"
    supports = frozenset(SamplingParams.__dataclass_fields__) - {"capture", "interventions"}

    def __init__(self, info: ModelInfo, options: EngineOptions, roofline: Roofline, prefixes: int) -> None:
        super().__init__()
        self.max_model_len = options.max_model_len or 131072
        self._roofline = roofline
        self._max_batch_size = options.max_batch_size
        self._prefixes: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._keep = prefixes
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._start("simulated-engine")

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        row = _Row(self._admit(request, emit))
        with self._changed:
            self._waiting.append(row)
            self._changed.notify()

    def stats(self) -> EngineStats:
        return replace(super().stats(), prefix_entries=len(self._prefixes))

    def _work(self) -> None:
        ready = 0.0
        while True:
            with self._changed:
                while not (self._rows or self._waiting or self._closing):
                    ready = 0.0
                    self._changed.wait()
                if not (self._rows or self._waiting):
                    return
                seconds = self._step()
            # A late wake-up is made up for by the next step, or a busy machine would slow the simulated one.
            now = time.monotonic()
            ready = _DEVICE.book(max(ready, now - 1.0) if ready else now, seconds)
            time.sleep(max(0.0, ready - time.monotonic()))
            self._speak()

    def _step(self) -> float:
        """Admit rows; the seconds that a device would need for their prompts and a token of every row."""
        new = 0
        while self._waiting and len(self._rows) < self._max_batch_size:
            row = self._waiting.popleft()
            if not row.live.active:
                continue
            self._rows.append(row)
            row.live.running = True
            ids = row.live.request.input_ids
            row.cached = self._reuse(ids)
            new += len(ids) - row.cached
            self._counts["prompt_tokens"] += len(ids)
            self._counts["cached_tokens"] += row.cached
        held = sum(len(row.live.request.input_ids) + row.said for row in self._rows)
        return self._roofline.prefill(new) + self._roofline.decode(held)

    def _speak(self) -> None:
        self._counts["steps"] += 1
        for row in self._rows:
            row.said += 1
            last = row.said >= (row.live.request.sampling.max_tokens or 1)
            row.live.give(
                Delta(
                    text=f"word{row.said} ",
                    token_ids=(row.said,),
                    finish_reason="length" if last else None,
                    cached_tokens=row.cached,
                )
            )
        self._rows = [row for row in self._rows if row.live.active]

    def _reuse(self, ids: list[int]) -> int:
        """How many tokens of a prompt are known from an earlier one, which it replaces if it has all of them."""
        best: tuple[int, ...] = ()
        saved = 0
        prompt = tuple(ids)
        for known in self._prefixes:
            if (common := common_prefix(known, prompt)) > saved:
                best, saved = known, common
        if best:
            self._prefixes.move_to_end(best)
        if saved == len(best):
            self._prefixes.pop(best, None)
        self._prefixes[prompt] = None
        while len(self._prefixes) > self._keep:
            self._prefixes.popitem(last=False)
        return min(saved, len(ids) - 1)


def load_model(device: str, load_seconds: float = 5.0, prefixes: int = 64, **roofline: float) -> dict[str, Any]:
    """A simulated model.

    Args:
        load_seconds: what loading takes, times `slowdown`.
        prefixes: prompts the prefix store keeps.
        roofline: see `Roofline`.
    """
    line = Roofline(**roofline)
    time.sleep(load_seconds * line.slowdown)
    return {
        "engine": lambda info, options: SimulatedEngine(info, options, line, prefixes),
        "apply_chat_template": lambda messages, **_: "".join(f"<{m['role']}> {m['content']} " for m in messages),
        "encode": lambda text, **_: {"input_ids": [hash(word) & 0xFFFF for word in text.split()]},
        "decode": lambda ids, **_: " ".join(f"word{i}" for i in ids.tolist()),
    }
