"""A LoRA as it lies in its folder: read whole, and refused by name if a part of it would have no effect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.adapters.lora_config import CONFIG_FILE, LoraConfig, read_lora_config
from deployments.adapters.refused import AdapterRefused
from deployments.adapters.safetensors_file import read_tensors

if TYPE_CHECKING:
    from numpy import ndarray

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B)"
)
_PARTS = {"A.weight": "a", "B.weight": "b", "B.bias": "bias", "embedding_A": "a", "embedding_B": "b"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraArrays:
    """The matrices of one module, in float32 as they were trained.

    Attributes:
        a: [rank, inputs].
        b: [outputs, rank].
        bias: [outputs], of the second matrix; None without one.
        embedding: the module is an embedding, whose inputs are its tokens.
    """

    a: ndarray[Any, Any]
    b: ndarray[Any, Any]
    bias: ndarray[Any, Any] | None = None
    embedding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """A LoRA: its configuration, and its matrices by the names of their modules."""

    config: LoraConfig
    modules: Mapping[str, LoraArrays]

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(int(arrays.a.shape[0]) for arrays in self.modules.values())


def read_lora(folder: Path, max_rank: int | None = None) -> LoraFile:
    """The LoRA in a folder. Blocks: it reads all of it.

    Raises:
        AdapterRefused: it is none, or a part of it is missing, superfluous, not finite or without effect.
    """
    config = read_lora_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / _PICKLE).is_file():
            raise AdapterRefused(f"its weights are a pickle ({_PICKLE}), which can run code; save {WEIGHTS_FILE}.")
        raise AdapterRefused(f"its folder has no {WEIGHTS_FILE}.")
    tensors = read_tensors(folder / WEIGHTS_FILE)
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterRefused(f"{WEIGHTS_FILE} has {key}, which belongs to no LoRA of a module.")
        parts = found.setdefault(match["module"], {"embedding": "embedding" in match["part"]})
        parts[_PARTS[match["part"]]] = tensor
    if not found:
        raise AdapterRefused(f"{WEIGHTS_FILE} is empty.")
    modules = {module: _checked(module, parts, config) for module, parts in found.items()}
    file = LoraFile(config=config, modules=modules)
    _check_whole(file)
    if max_rank is not None and file.rank > max_rank:
        raise AdapterRefused(f"its rank is {file.rank}; adapters.max_rank of its base is {max_rank}.")
    return file


def _checked(module: str, parts: Mapping[str, Any], config: LoraConfig) -> LoraArrays:
    import numpy as np

    for part in ("a", "b"):
        if part not in parts:
            raise AdapterRefused(f"{WEIGHTS_FILE} lacks matrix {part.upper()} of {module}.")
    arrays = LoraArrays(**parts)
    rank = config.rank_of(module)
    if arrays.a.ndim != 2 or arrays.b.ndim != 2:
        raise AdapterRefused(f"the matrices of {module} have {arrays.a.ndim} dimensions: LoRA is served on linears.")
    if not arrays.a.shape[0] == arrays.b.shape[1] == rank:
        raise AdapterRefused(
            f"the matrices of {module} have the ranks {arrays.a.shape[0]} and {arrays.b.shape[1]}; the configuration "
            f"says {rank}."
        )
    if (arrays.bias is not None) != config.bias:
        found = "no" if arrays.bias is None else "a"
        raise AdapterRefused(f"{module} has {found} bias of LoRA; lora_bias in {CONFIG_FILE} is {config.bias}.")
    for array in (arrays.a, arrays.b, arrays.bias):
        if array is not None and not np.isfinite(array).all():
            raise AdapterRefused(f"the matrices of {module} have numbers that are not finite.")
    return arrays


def _check_whole(file: LoraFile) -> None:
    """Every name among the targets has matrices, every module with matrices is a target, and they have an effect."""
    for module in file.modules:
        if not file.config.is_target(module):
            raise AdapterRefused(f"{WEIGHTS_FILE} has matrices of {module}, which is not among target_modules.")
    for name in file.config.named_targets():
        if not any(module == name or module.endswith(f".{name}") for module in file.modules):
            raise AdapterRefused(f"{WEIGHTS_FILE} has no matrices of {name}, which is among target_modules.")
    if not any(arrays.b.any() or (arrays.bias is not None and arrays.bias.any()) for arrays in file.modules.values()):
        raise AdapterRefused("all its matrices B are zero, so it is its base: it was not trained, or not loaded whole.")
