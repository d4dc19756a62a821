"""Part `adapters`: batches of several adapters, which a version may lack."""

from __future__ import annotations

import importlib.util
import json
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_requests import Engine, random_prompts

from gpu_parts.setting import Measured, Setting, Skipped

_RANK = 16


def adapters(setting: Setting) -> Measured:
    """Sixteen requests over one base: with no adapter, one and eight."""
    if importlib.util.find_spec("deployments.engine.adapters") is None:
        raise Skipped("this version has no adapters")
    from deployments.adapters.lora_file import read_lora

    model = setting.model(setting.models[0])
    rows, new = setting.sized(16, 4), setting.sized(64, 8)
    engine = setting.engine(model, rows)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(8):
            lora(model, Path(folder), number)
            engine.batching_engine.add_adapter(f"adapter-{number}", read_lora(Path(folder)))
    prompts = random_prompts(random.Random(5), rows, setting.sized(100, 8), model.config.vocab_size)
    figures: dict[str, Any] = {}
    for count in (0, 1, 8):
        keys = [f"adapter-{i % count}" if count else "" for i in range(rows)]
        _run(engine, prompts, keys, 4)
        taken = [
            setting.seconds(lambda keys=keys: _run(engine, prompts, keys, new)) for _ in range(setting.sized(3, 1))
        ]
        figures[f"{count} adapters, tokens/s"] = rows * new / median(taken)
    figures["one adapter costs"] = figures["0 adapters, tokens/s"] / figures["1 adapters, tokens/s"]
    figures["eight adapters cost"] = figures["0 adapters, tokens/s"] / figures["8 adapters, tokens/s"]
    engine.close()
    return figures, []


def _run(engine: Engine, prompts: list[list[int]], keys: list[str], new: int) -> None:
    for client in [engine.start(ids, new, adapter=key) for ids, key in zip(prompts, keys, strict=True)]:
        client.wait()


def lora(model: Any, folder: Path, seed: int) -> None:
    """Write random matrices for the attention of every layer, in PEFT's form."""
    from safetensors.torch import save_file

    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            for part, shape in (("A", (_RANK, module.in_features)), ("B", (module.out_features, _RANK))):
                key = f"base_model.model.{name}.lora_{part}.weight"
                tensors[key] = 0.02 * torch.randn(shape, generator=chance)
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
