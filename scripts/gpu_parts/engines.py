"""Parts `engine`, `sampling` and `others`: whole requests, choosing tokens, and transformers' own ways."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from bench_baselines import continuous_batching, padded_generate
from bench_requests import Engine, random_prompts
from bench_sampling import FLAT, WISHES
from transformers import GenerationConfig

from deployments.core.calls import SamplingParams
from deployments.engine.sampling.sample import sample_batch
from deployments.engine.sampling.state import SequenceSampler
from gpu_parts.right import alike
from gpu_parts.setting import Mark, Measured, Setting


def engine_runs(setting: Setting) -> Measured:
    """Requests of 300 tokens and 256 more, with graphs and without; then requests that come and go."""
    figures: dict[str, Any] = {}
    marks: list[Mark] = []
    for size in setting.models:
        model = setting.model(size)
        for rows in setting.rows:
            found = _on_and_off(setting, model, rows)
            figures[f"{size} x {rows}"] = found
            differing = found.pop("differing")
            marks.append(setting.mark(f"{size} x {rows}: texts that differ", differing, "none", not differing))
        gain = figures[f"{size} x 1"]["times"]
        if size != "8b":
            marks.append(setting.timed(f"{size} x 1: graphs against none", gain, "1.5 or more", gain >= 1.5))
        figures[f"{size} churn"] = _churn(setting, model)
        del model
    return figures, marks


def _on_and_off(setting: Setting, model: Any, rows: int) -> dict[str, Any]:
    rng, new = random.Random(rows), setting.sized(128, 12)
    prompts = random_prompts(rng, rows, setting.sized(300, 12), model.config.vocab_size)
    with setting.fixed() as made:
        on = setting.engine(model, rows)
    off = setting.engine(model, rows)
    figures: dict[str, Any] = {}
    texts: dict[str, list[list[int]]] = {}
    seconds: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    for _ in range(setting.sized(2, 1) + 1):
        for name, engine in (("on", on), ("off", off)):
            clients: list[Any] = []
            taken = setting.seconds(lambda engine=engine, clients=clients: _greedy(engine, prompts, new, clients))
            texts[name] = [client.tokens for client in clients]
            seconds.setdefault(name, []).append(taken)
            gaps[name] = [gap for client in clients for gap in client.gaps[new // 3 :]]
    for name, engine in (("on", on), ("off", off)):
        figures[f"graphs {name}, tokens/s"] = rows * new / median(seconds[name][1:])
        figures[f"graphs {name}, first run s"] = seconds[name][0]
        figures[f"graphs {name}, a step, ms"] = 1e3 * median(gaps[name])
        sampled = setting.seconds(partial(_sampled, engine, prompts, new))
        figures[f"graphs {name}, top_p 0.95, tokens/s"] = rows * new / sampled
    figures["times"] = median(seconds["off"][1:]) / median(seconds["on"][1:])
    figures["captures"], figures["reason"] = made[-1].captured, made[-1].reason
    pairs = enumerate(zip(prompts, texts["on"], texts["off"], strict=True))
    figures["differing"] = [i for i, (ids, one, other) in pairs if not alike(model, ids, one, other)]
    on.close()
    off.close()
    return figures


def _greedy(engine: Engine, prompts: list[list[int]], new: int, clients: list[Any]) -> None:
    clients += [engine.start(ids, new) for ids in prompts]
    for client in clients:
        client.wait()


def _sampled(engine: Engine, prompts: list[list[int]], new: int) -> None:
    for client in [engine.start(ids, new, temperature=0.8, top_p=0.95, seed=1) for ids in prompts]:
        client.wait()


def _churn(setting: Setting, model: Any) -> dict[str, Any]:
    """Requests of different lengths, 32 at a time, with graphs and without: what captures cost when buffers move."""
    figures: dict[str, Any] = {}
    rng = random.Random(7)
    count = setting.sized(96, 6)
    asked = [
        (
            random_prompts(rng, 1, rng.randrange(8, setting.sized(400, 20)), model.config.vocab_size)[0],
            rng.randrange(4, setting.sized(512, 12)),
        )
        for _ in range(count if model.config.hidden_size < 4096 else count // 4)
    ]
    for name in ("on", "off"):
        with ExitStack() as stack:
            made = stack.enter_context(setting.fixed()) if name == "on" else []
            engine = setting.engine(model, setting.sized(32, 3))

        def run(engine: Engine = engine) -> None:
            for client in [engine.start(ids, new) for ids, new in asked]:
                client.wait()

        taken = setting.seconds(run)
        figures[f"graphs {name}, tokens/s"] = sum(new for _, new in asked) / taken
        if made:
            figures |= {"captures": made[-1].captured, "fixed steps": made[-1].repeated, "reason": made[-1].reason}
        engine.close()
    return figures


def sampling(setting: Setting) -> Measured:
    """Milliseconds and waits of the host, choosing a token for each of 64 sequences."""
    rows, vocab = setting.sized(64, 4), setting.sized(128_256, 2000)
    flat = torch.randn(rows, vocab, device=setting.device)
    likely = torch.rand(rows, vocab, device=setting.device).topk(64).indices
    peaked = flat.scatter_add(1, likely, torch.linspace(10, 22, 64, device=setting.device).expand(rows, 64))
    wishes = {**WISHES, "typical_p 0.95": {"temperature": 0.7, "typical_p": 0.95}}
    figures: dict[str, Any] = {}
    for name, wish in wishes.items():
        samplers = [
            SequenceSampler(
                SamplingParams(seed=i, **wish),
                range(300),
                eos_ids=frozenset(),
                vocab_size=vocab,
                device=torch.device(setting.device),
            )
            for i in range(rows)
        ]

        @torch.inference_mode()
        def choose(logits: torch.Tensor = flat if name == FLAT else peaked, samplers: Any = samplers) -> None:
            sample_batch(logits, samplers)

        figures[name] = {"ms": 1e3 * setting.median(choose), "waits": _waits(setting, choose)}
    limits = {"greedy": 0.3, "top_p 0.95": 1.5}
    taken = {name: figures[name]["ms"] for name in limits}
    return figures, [
        setting.timed(f"{name}, ms", taken[name], f"below {limits[name]}", taken[name] < limits[name])
        for name in limits
    ]


def _waits(setting: Setting, call: Callable[[], Any]) -> int | None:
    """How often the host waits for the device in a call, by torch's own count."""
    if not setting.is_cuda:
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def others(setting: Setting) -> Measured:
    """`generate` with a growing and a fixed cache, and continuous batching, on the same prompts. Not judged."""
    size = setting.models[0]
    model = setting.model(size)
    new, length = setting.sized(256, 8), setting.sized(300, 12)
    rng = random.Random(4)
    figures: dict[str, Any] = {}
    one = random_prompts(rng, 1, length, model.config.vocab_size)
    run = padded_generate(model, setting.device)
    run(one, 4)
    figures["generate, 1 row, tokens/s"] = new / setting.seconds(lambda: run(one, new))
    figures |= _static(setting, model, one, new)
    for rows in setting.rows[1:]:
        prompts = random_prompts(rng, rows, length, model.config.vocab_size)
        for name, options in _batching_forms(setting):
            key = f"continuous batching ({name}), {rows} rows, tokens/s"
            try:
                figures[key] = rows * new / _batching(setting, model, prompts, new, options)
            except (Exception, SystemExit) as error:
                figures[key] = f"not measured: {error}"[:300]
    return figures, []


def _static(setting: Setting, model: Any, prompts: list[list[int]], new: int) -> dict[str, Any]:
    ids = torch.tensor(prompts, device=setting.device)
    settings = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, cache_implementation="static"
    )

    @torch.inference_mode()
    def run() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)

    try:
        first = setting.seconds(run)
        return {"static generate, first run s": first, "static generate, tokens/s": new / setting.seconds(run)}
    except (RuntimeError, ValueError) as error:
        return {"static generate": f"not measured: {error}"[:300]}


def _batching_forms(setting: Setting) -> list[tuple[str, dict[str, Any]]]:
    """Continuous batching as it sets itself up on a GPU; by hand on a CPU, whose memory it would take."""
    if not setting.is_cuda:
        return [("by hand", {"by_hand": True})]
    return [("its defaults", {}), ("by hand, sdpa", {"by_hand": True})]


def _batching(setting: Setting, model: Any, prompts: list[list[int]], new: int, options: dict[str, Any]) -> float:
    if options.get("by_hand"):
        with continuous_batching(model, len(prompts), len(prompts[0]) + new, len(prompts)) as run:
            run(prompts, 4)
            return setting.seconds(lambda: run(prompts, new))
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=new)

    def batch() -> None:
        found = model.generate_batch(inputs=prompts, generation_config=settings, progress_bar=False)
        assert all(len(each.generated_tokens) == new for each in found.values())

    batch()
    return setting.seconds(batch)
