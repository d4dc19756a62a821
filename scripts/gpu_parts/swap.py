"""Part `swap`: a model that lost its place comes back from host memory."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deployments.config.app import parse_args
from deployments.core.collector import leave_imports
from deployments.host.host import ModelHost
from deployments.host.memory.storages import Storages
from gpu_parts.setting import Measured, Setting

VISITS: list[str] = []
"""The folders that the loader below was called for."""


def load_model(folder: str, device: str) -> dict[str, Any]:
    """A loader of a model without a tokenizer: prompts are token ids."""
    from transformers import AutoModelForCausalLM

    VISITS.append(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    return {"model": model, "encode": lambda *_, **__: {"input_ids": [1]}, "decode": lambda *_, **__: ""}


def swap(setting: Setting) -> Measured:
    """Two models that take turns in one place."""
    with tempfile.TemporaryDirectory() as top:
        for name in "ab":
            setting.model(setting.models[0]).save_pretrained(Path(top) / name)
        leave_imports()
        figures, same = asyncio.run(_visits(setting, Path(top)))
    figures |= _moved(setting)
    share = figures["to the device, GB/s"] / figures["pinned copy, GB/s"] if setting.is_cuda else None
    return figures, [
        setting.mark("the logits of two prompts have the same bits", same, "True", same),
        setting.mark("calls of the loader", len(VISITS), "2, one a model", len(VISITS) == 2),
        setting.timed("back to the device, of a pinned copy", share, "0.6 or more", share is None or share >= 0.6),
    ]


async def _visits(setting: Setting, top: Path) -> tuple[dict[str, Any], bool]:
    VISITS.clear()
    models = [
        {"id": name, "loader": "gpu_parts.swap:load_model", "kwargs": {"folder": str(top / name)}} for name in "ab"
    ]
    args = {"models": models, "host_memory_gib": 64, "swap_patience_s": 0}
    host = ModelHost(parse_args(args), setting.device)
    taken: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    samples = []
    for visit, name in enumerate("abababab"):
        begun, used = time.monotonic(), time.process_time()
        async with host.lease(name) as model:
            taken.setdefault(_named(visit), []).append(time.monotonic() - begun)
            processor.setdefault(_named(visit), []).append(time.process_time() - used)
            if name == "a":
                samples.append(model.engine.capabilities.sample)  # type: ignore[attr-defined]
            nbytes = model.weight_bytes
    await host.close()
    figures: dict[str, Any] = {"weights, GB": nbytes / 1e9}
    figures |= {f"{name}, s": median(seconds) for name, seconds in taken.items()}
    figures |= {f"{name}, s of processor time": median(seconds) for name, seconds in processor.items()}
    return figures, all(torch.equal(samples[0], sample) for sample in samples)


def _named(visit: int) -> str:
    """A visit; also what makes room for it is in its time."""
    return {0: "first load", 1: "first load of another of its kind"}.get(visit, "second visit")


def _moved(setting: Setting) -> dict[str, Any]:
    """How quickly a model's weights leave the device and come back, beside one copy of pinned memory."""
    model = setting.model(setting.models[0])
    storages = Storages(model)
    away = setting.seconds(storages.release)
    back = setting.seconds(storages.restore)
    size = setting.sized(1 << 30, 1 << 16)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=setting.is_cuda)
    own = torch.empty(size, dtype=torch.uint8, device=setting.device)
    copied = setting.median(lambda: own.copy_(host, non_blocking=True), 10)
    return {
        "to the host, GB/s": storages.nbytes / away / 1e9,
        "to the device, GB/s": storages.nbytes / back / 1e9,
        "pinned copy, GB/s": size / copied / 1e9,
    }
