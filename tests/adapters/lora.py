"""Random adapters for tiny models, in the format of PEFT, and the dense merges that are their references."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def write_adapter(
    model: nn.Module,
    folder: Path,
    targets: Sequence[str],
    *,
    seed: int = 0,
    rank: int = 4,
    size: float = 0.3,
    change: Change | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A random adapter of these modules of a model.

    Args:
        size: of the matrices' numbers.
        change: what is done to tensors and configuration before they are written.
    """
    generator = torch.Generator().manual_seed(seed)
    options = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        **config,
    }
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in targets and name not in targets:
            continue
        own = options.get("rank_pattern", {}).get(name.rpartition(".")[2], rank)
        inputs, outputs = sizes(module)
        made = [size * torch.randn(shape, generator=generator) for shape in ((own, inputs), (outputs, own), (outputs,))]
        key = f"base_model.model.{name}.lora_"
        if isinstance(module, nn.Embedding):
            tensors[f"{key}embedding_A"], tensors[f"{key}embedding_B"] = made[:2]
        else:
            tensors[f"{key}A.weight"], tensors[f"{key}B.weight"] = made[:2]
            if options.get("lora_bias"):
                tensors[f"{key}B.bias"] = made[2]
            if options.get("use_dora"):
                tensors[f"{key}magnitude_vector"] = made[2].abs() + 1
        if isinstance(module, nn.Embedding) or name == "lm_head":  # PEFT writes these too.
            tensors[f"base_model.model.{name}.base_layer.weight"] = module.weight.detach().clone()
    for name, module in model.named_modules():
        if name.endswith(tuple(options.get("modules_to_save", ()))):
            for part, parameter in module.named_parameters(recurse=False):
                moved = parameter.detach() + size * torch.randn(parameter.shape, generator=generator)
                tensors[f"base_model.model.{name}.{part}"] = moved
    for name, ids in _tokens(model, options.get("trainable_token_indices")).items():
        vectors = torch.randn((len(ids), model.get_submodule(name).weight.shape[1]), generator=generator)
        tensors[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"] = vectors
    if change is not None:
        change(tensors, options)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return folder


def _tokens(model: Any, given: Any) -> dict[str, list[int]]:
    """Trained tokens by the names of their modules; a list is for the input embedding."""
    named = given if isinstance(given, dict) else {"": given} if given else {}
    modules = dict(model.named_modules())
    of = {name: module for name, module in modules.items() if module is model.get_input_embeddings()}
    return {
        next(name for name in (of if not ending else modules) if name.endswith(ending)): ids
        for ending, ids in named.items()
    }


def sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    weight: Any = module.weight
    return (weight.shape[0], weight.shape[1]) if isinstance(module, Conv1D) else (weight.shape[1], weight.shape[0])


def merged(model: Any, folder: Path, scale: Callable[[str], float]) -> Any:
    """A copy of a model with an adapter merged into its weights.

    Args:
        scale: of each module's product, by its name.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, ids in _tokens(model, config.get("trainable_token_indices")).items():
            key = f"base_model.model.{name}.token_adapter.trainable_tokens_delta"
            model.get_submodule(name).weight[ids] = tensors.pop(key).to(model.dtype)
        for key, first in tensors.items():
            name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
            if not name and ".base_layer." not in key:
                whole, _, part = key.removeprefix("base_model.model.").rpartition(".")
                setattr(model.get_submodule(whole), part, nn.Parameter(first.to(model.dtype)))
            if part not in ("A.weight", "embedding_A"):
                continue
            module = model.get_submodule(name)
            product = tensors[key.replace("_A", "_B")].float() @ first.float() * scale(name)
            turned = isinstance(module, Conv1D | nn.Embedding)
            untied(module)
            magnitude = tensors.get(f"base_model.model.{name}.lora_magnitude_vector")
            if magnitude is not None:
                whole = (module.weight.T if turned else module.weight) + product
                product = whole * (magnitude / whole.norm(dim=1))[:, None] - (whole - product)
            module.weight += (product.T if turned else product).to(module.weight.dtype)
            bias = tensors.get(f"base_model.model.{name}.lora_B.bias")
            if bias is not None:
                own = torch.zeros_like(bias) if module.bias is None else module.bias
                module.bias = nn.Parameter(own + bias * scale(name))
    return model


@contextlib.contextmanager
def unmerged(base: Any, folder: Path | None) -> Iterator[Any]:
    """A base with an adapter as PEFT computes it: the delta in float32, added and rounded once."""
    tensors = {} if folder is None else load_file(folder / "adapter_model.safetensors")
    handles = []
    for key, first in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        second = tensors[key.replace("lora_A", "lora_B")]

        def add(module: Any, args: Any, output: Any, first: Any = first, second: Any = second) -> Any:
            return (output + 2.0 * (args[0].float() @ first.T @ second.T)).to(output.dtype)

        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        handles.append(base.get_submodule(name).register_forward_hook(add))
    try:
        yield base
    finally:
        for handle in handles:
            handle.remove()


def untied(module: Any) -> None:
    """Give a module a weight of its own, which it may share with an embedding or a head."""
    module.weight = nn.Parameter(module.weight.detach().clone())


def scale_of(config: Mapping[str, Any]) -> float:
    """The scale of an adapter without patterns."""
    return float(config["lora_alpha"] / config["r"])
