"""Parts `steps`, `capture` and `compiled`: what a decode step of the engine's takes, and what a graph costs."""

from __future__ import annotations

import cProfile
import random
import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Any

import torch

from deployments.engine.cache.cache import BatchCache, new_cache
from deployments.engine.model.attention import planned_attention
from deployments.engine.model.forward import NO_OFFSET, Forward
from deployments.engine.speedups.fixed_decode import Capture, FixedDecode, Run, uncaptured
from gpu_parts.hardware import kernels
from gpu_parts.setting import Mark, Measured, Setting

LIMITS = {"1b": 0.5, "8b": 0.75, "tiny": 1.0}
"""A replay's share of an ordinary step with one row."""
# For 512 tokens a row: the roofline of an H100 is 0.83, 0.91 and 1.18 ms for 1 B, 5.0, 5.4 and 6.4 ms for 8 B.
EXPECTED_MS = {("1b", 1): 3.0, ("1b", 16): 3.5, ("1b", 64): 5.7, ("8b", 1): 9.6, ("8b", 16): 9.8, ("8b", 64): 14.0}
"""Of a replay on an H100 by arithmetic, before anything was measured."""


class Steps:
    """Decode steps of a batch of equally long sequences.

    Args:
        rows, length: sequences, and tokens of each when it begins.
    """

    def __init__(self, model: Any, rows: int, length: int) -> None:
        self.forward = Forward(model)
        rng = random.Random(3)
        vocab = model.config.vocab_size
        self.rows = rows
        self.cache = new_cache(model)
        chunk = max(1, 8192 // rows)
        ids = [[rng.randrange(1, vocab) for _ in range(length)] for _ in range(rows)]
        with torch.inference_mode():
            for first in range(0, length, chunk):
                logits = self.forward.prefill([each[first : first + chunk] for each in ids], self.cache).logits
        self._last = logits[:, -1].argmax(-1).tolist()

    def step(self, decode: Any) -> torch.Tensor:
        """Logits of one more token for every row; it is always the same, so that no step waits for another."""
        with torch.inference_mode():
            found: torch.Tensor = decode(self._last, [NO_OFFSET] * self.rows, self.cache)
        return found


def steps(setting: Setting) -> Measured:
    """Ordinary, fixed and replayed steps against the roofline, and prefill."""
    figures: dict[str, Any] = {}
    marks: list[Mark] = []
    read = 1e9 * float(setting.known.get("read_gb_s") or 0) or None
    for size in setting.models:
        model = setting.model(size)
        shapes = [(rows, setting.sized(512, 20)) for rows in setting.rows]
        if size == "8b":
            shapes.append((16, 4096))
        for rows, length in shapes:
            found = _of_shape(setting, model, rows, length, read)
            found["expected_ms"] = EXPECTED_MS.get((size, rows)) if length == 512 else None
            figures[f"{size} {rows} x {length}"] = found
        for tokens in setting.sized_prompts:
            figures[f"{size} prefill {tokens}"] = {"ms": 1e3 * _prefill(setting, model, tokens)}
        one = figures[f"{size} 1 x {shapes[0][1]}"]
        share = one["replay_ms"] / one["ordinary_ms"]
        limit = LIMITS[size]
        marks.append(
            setting.timed(f"{size}, 1 row: replay of an ordinary step", share, f"{limit} or less", share <= limit)
        )
        marks.append(setting.mark(f"{size}: replays to the end", one["reason"], "no reason", one["reason"] is None))
        del model
    return figures, marks


def _of_shape(setting: Setting, model: Any, rows: int, length: int, read: float | None) -> dict[str, Any]:
    """Milliseconds of a step in its three forms, the host's share of the ordinary one, and the roofline."""
    batch = Steps(model, rows, length)
    repeats = setting.sized(30, 3)
    with planned_attention():
        planned = _median(setting, batch, batch.forward.decode, setting.sized(8, 3))
    ordinary = _median(setting, batch, batch.forward.decode, repeats)
    launch = _launch(setting, batch, repeats)
    plain = FixedDecode(batch.forward, uncaptured)
    fixed = _median(setting, batch, plain.decode, repeats)
    graphs = FixedDecode(batch.forward, setting.capture)
    replay = _median(setting, batch, graphs.decode, repeats)
    buffer = list(batch.cache.held[0].buffers[0].shape)  # type: ignore[attr-defined]
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    columns = sum(each.column_bytes for each in batch.cache.held)  # type: ignore[attr-defined]
    roofline = (weights + rows * length * columns) / read if read else None
    return {
        "ordinary_with_cudnn_ms": 1e3 * planned,
        "ordinary_ms": 1e3 * ordinary,
        "launch_ms": 1e3 * launch,
        "fixed_ms": 1e3 * fixed,
        "replay_ms": 1e3 * replay,
        "roofline_ms": 1e3 * roofline if roofline else None,
        "buffer": buffer,
        "reason": graphs.reason,
        "kernels": kernels(setting, lambda: batch.step(graphs.decode), 15),
        "python": _python(setting, lambda: batch.step(batch.forward.decode)),
    }


def _python(setting: Setting, call: Callable[[], Any]) -> list[str]:
    """The functions in which an ordinary step spends most of the host's time, with milliseconds."""
    setting.synchronize()
    with cProfile.Profile() as profile:
        call()
        setting.synchronize()
    found = sorted(profile.getstats(), key=lambda each: -each.inlinetime)[:8]
    return [f"{each.code}: {1e3 * each.inlinetime:.2f} ({each.callcount} calls)" for each in found]


def _median(setting: Setting, batch: Steps, decode: Any, repeats: int) -> float:
    for _ in range(setting.sized(6, 3)):
        batch.step(decode)
    return median(setting.seconds(lambda: batch.step(decode)) for _ in range(repeats))


def _launch(setting: Setting, batch: Steps, repeats: int) -> float:
    """Seconds that the host takes to launch an ordinary step, with an idle device before it."""
    taken = []
    for _ in range(repeats):
        setting.synchronize()
        begun = time.perf_counter()
        batch.step(batch.forward.decode)
        taken.append(time.perf_counter() - begun)
    return median(taken)


def _prefill(setting: Setting, model: Any, tokens: int) -> float:
    forward, ids = Forward(model), [[i % 500 + 1 for i in range(tokens)]]

    @torch.inference_mode()
    def run() -> None:
        forward.prefill(ids, new_cache(model))

    return setting.median(run, 5)


def capture(setting: Setting) -> Measured:
    """Seconds and bytes of a graph; then captures that fail: of an operator that is not permitted, and of memory."""
    model = setting.model(setting.models[0])
    batch = Steps(model, setting.rows[-1], setting.sized(512, 20))
    batch.step(batch.forward.decode)
    before = setting.memory()
    graphs = FixedDecode(batch.forward, setting.capture)
    first = setting.seconds(lambda: batch.step(graphs.decode))
    ordinary = setting.seconds(lambda: batch.step(batch.forward.decode))
    held = setting.memory() - before
    prefill = [_prefill_once(setting, model) for _ in range(2)]
    figures = {
        "warm_up_capture_and_replay_s": first,
        "graph_mb": held / 1e6,
        "first_prefill_after_ms": 1e3 * prefill[0],
        "second_prefill_ms": 1e3 * prefill[1],
    }
    taken = first - 2 * ordinary
    marks = [
        setting.mark("captures", graphs.captured, "1", graphs.captured == 1),
        setting.timed("a capture, s", taken, "below 0.3", taken < 0.3),
        setting.timed("a graph, MB", held / 1e6, "below 100", held < 100e6),
    ]
    for name, broken in (("an operator that waits", _waits(setting)), ("memory", _no_memory(setting))):
        marks.append(_after_failure(setting, batch, name, broken))
    return figures, marks


def _prefill_once(setting: Setting, model: Any) -> float:
    forward, ids = Forward(model), [[7] * setting.sized(512, 20)]

    @torch.inference_mode()
    def run() -> None:
        forward.prefill(ids, new_cache(model))

    return setting.seconds(run)


def _waits(setting: Setting) -> Capture:
    """Captures a step that reads a number of the device, which no graph can."""

    def broken(run: Run) -> Run:
        if not setting.is_cuda:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

        def waiting() -> torch.Tensor:
            found = run()
            found.sum().item()
            return found

        return setting.capture(waiting)

    return broken


def _no_memory(setting: Setting) -> Capture:
    """Captures a step that allocates more than there is."""

    def broken(run: Run) -> Run:
        def hungry() -> torch.Tensor:
            torch.empty(1 << 44, dtype=torch.uint8, device=setting.device)
            return run()

        return setting.capture(hungry)

    return broken


def _after_failure(setting: Setting, batch: Steps, name: str, broken: Capture) -> Mark:
    """Whether steps have the logits of ordinary ones while and after a capture fails."""
    fixed = FixedDecode(batch.forward, broken)
    good = True
    for _ in range(3):
        found = batch.step(fixed.decode).clone()
        cuts = [1] * batch.rows
        assert isinstance(batch.cache, BatchCache)
        batch.cache.trim(cuts)
        expected = batch.step(batch.forward.decode)
        with suppress(RuntimeError):
            good = good and bool(torch.allclose(found.float(), expected.float(), rtol=0.1, atol=0.1))
    ended = fixed.reason is None if name == "memory" else fixed.reason is not None
    return setting.mark(
        f"steps after a capture fails for {name}", fixed.reason or "captures later", "go on", good and ended
    )


def compiled(setting: Setting) -> Measured:
    """Every decoder layer compiled, then captured in a graph of ours."""
    figures: dict[str, Any] = {}
    marks: list[Mark] = []
    for size in setting.models:
        model = setting.model(size)
        begun = time.perf_counter()
        for layer in model.model.layers:
            layer.compile(**({"backend": "eager"} if setting.tiny else {"dynamic": False}))
        for rows in setting.rows:
            batch = Steps(model, rows, setting.sized(512, 20))
            fixed = FixedDecode(batch.forward, _warmed(setting.capture))
            replay = _median(setting, batch, fixed.decode, setting.sized(30, 3))
            figures[f"{size} x {rows}"] = {"ms": 1e3 * replay, "reason": fixed.reason}
            figures[f"{size} seconds so far"] = time.perf_counter() - begun
        one = figures[f"{size} x 1"]
        if size in ("1b", "tiny"):
            marks.append(setting.timed(f"{size} x 1, ms", one["ms"], "1.6 or less", one["ms"] <= 1.6))
        marks.append(setting.mark(f"{size}: replays to the end", one["reason"], "no reason", one["reason"] is None))
        del model
    return figures, marks


def _warmed(capture: Capture) -> Capture:
    """A compiled function must not compile inside a capture."""

    def warmed(run: Callable[[], torch.Tensor]) -> Run:
        run()
        run()
        return capture(run)

    return warmed
