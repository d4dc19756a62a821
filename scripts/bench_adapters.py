#!/usr/bin/env python3
"""What adapters cost: decode steps and prefills with them, against those of the packed base and against PEFT.

    python scripts/bench_adapters.py --json adapters.json

Needs torch, transformers and, for the comparison, peft; no weights: the model is made from a config. Times are
processor time of the thread that computes, so that neighbors on the machine disturb little. The variants take turns
within a round; figures are medians over the rounds, and so are the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from deployments.adapters.lora_file import read_lora
from deployments.engine.adapters.table import AdapterTable
from deployments.engine.cache.cache import new_cache
from deployments.engine.model.forward import NO_OFFSET, Forward
from deployments.engine.model.patches import Patches
from deployments.engine.speedups.packed_linear import pack_linears
from deployments.engine.verify.row_probe import watch_modules

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = 16
RANK = 16
BEFORE = 128
"""Tokens of a sequence before the step that is measured."""
Variant = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", default="float32", help="of the matrices; float32 is the default of a server")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        table = measured(arguments, Path(folder))
    for case, figures in table.items():
        print(f"{case:28}" + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=1))


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of each variant, and the ratios to the packed base, by case."""
    build = partial(model_of, arguments.layers, arguments.width)
    folders = [write(build(), folder / f"a{i}", i) for i in range(ADAPTERS)]
    ours = Ours(build(), folders, getattr(torch, arguments.dtype))
    theirs = Theirs(build(), folders) if importlib.util.find_spec("peft") is not None else None
    cases = {f"decode, {rows} sequences": ([BEFORE] * rows, True) for rows in arguments.rows}
    cases |= {f"prefill, {rows} x {tokens}": ([tokens] * rows, False) for rows, tokens in ((1, 512), (8, 64), (16, 64))}
    table = {}
    for case, (lengths, decodes) in cases.items():
        count = len(lengths)
        own = [f"a{i % ADAPTERS}" for i in range(count)]
        variants: dict[str, Variant] = {
            "base": ours.variant(lengths, [""] * count, decodes=decodes),
            "one adapter": ours.variant(lengths, ["a0"] * count, decodes=decodes),
            "own adapters": ours.variant(lengths, own, decodes=decodes),
        }
        if theirs is not None:
            variants["PEFT"] = theirs.variant(lengths, own, decodes=decodes)
        table[case] = _figures(variants, arguments.rounds)
        print(case, file=sys.stderr, flush=True)
    return table


def _figures(variants: dict[str, Variant], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            begun = time.thread_time()
            run()
            taken[name].append(time.thread_time() - begun)
    taken = {name: seconds[1:] for name, seconds in taken.items()}  # The first round warms up.
    figures = {f"{name}, ms": 1e3 * median(seconds) for name, seconds in taken.items()}
    for name in list(taken)[1:]:
        ratios = [own / base for own, base in zip(taken[name], taken["base"], strict=True)]
        figures[f"{name} / base"] = median(ratios)
    return figures


class Side:
    """A model whose steps are measured."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.forward = Forward(model)

    def applied(self, keys: list[str]) -> AbstractContextManager[Any]:
        """The context of a forward with an adapter for each sequence; empty for the base."""
        raise NotImplementedError

    def variant(self, lengths: list[int], keys: list[str], *, decodes: bool) -> Variant:
        """A decode step after prompts of these lengths, or their prefill."""
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(self.model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]

        def prefill() -> Any:
            cache = new_cache(self.model)
            with self.applied(keys):
                self.forward.prefill(prompts, cache)
            return cache

        if not decodes:
            return lambda: void(prefill())
        cache = prefill()

        def step() -> None:
            with self.applied(keys):
                self.forward.decode([5] * len(keys), [NO_OFFSET] * len(keys), cache)

        return step


class Ours(Side):
    def __init__(self, model: Any, folders: list[Path], dtype: torch.dtype) -> None:
        super().__init__(model)
        pack_linears(model, Patches(), True)
        self.table = AdapterTable(model, watch=partial(watch_modules, self.forward, groups=True))
        for folder in folders:
            self.table.add(folder.name, self.table.fit(read_lora(folder), dtype))

    def applied(self, keys: list[str]) -> AbstractContextManager[Any]:
        return self.table.applied(keys)


class Theirs(Side):
    """PEFT's batches of several adapters."""

    def __init__(self, model: Any, folders: list[Path]) -> None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.adapted: Any = PeftModel.from_pretrained(model, str(folders[0]), adapter_name=folders[0].name)
            for folder in folders[1:]:
                self.adapted.load_adapter(str(folder), adapter_name=folder.name)
        super().__init__(model.eval())

    @contextlib.contextmanager
    def applied(self, keys: list[str]) -> Any:
        with self.adapted.base_model._enable_peft_forward_hooks(adapter_names=keys):
            yield


def void(_: Any) -> None:
    """Nothing, of something."""


def model_of(layers: int, width: int) -> Any:
    """A Llama in bfloat16 with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def write(model: Any, folder: Path, seed: int) -> Path:
    """A random adapter of all linears but the head, in PEFT's form."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(TARGETS):
            key = f"base_model.model.{name}.lora_"
            tensors[f"{key}A.weight"] = 0.02 * torch.randn(RANK, module.in_features, generator=generator)
            tensors[f"{key}B.weight"] = 0.02 * torch.randn(module.out_features, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": list(TARGETS)}))
    return folder


if __name__ == "__main__":
    main()
