"""A LoRA as it lies in its folder: read whole, and refused by name if a part of it would have no effect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.adapters.lora_config import CONFIG_FILE, LoraConfig, read_lora_config
from deployments.adapters.refused import AdapterRefused, NeedsMerge
from deployments.adapters.safetensors_file import read_tensors

if TYPE_CHECKING:
    from numpy import ndarray

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"lora_(?P<part>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|magnitude_vector(\.weight)?)"
)
_WHOLE = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.(?P<part>weight|bias)")
_TOKENS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_PARTS = {
    "A.weight": "a",
    "B.weight": "b",
    "B.bias": "bias",
    "embedding_A": "a",
    "embedding_B": "b",
    **dict.fromkeys(("magnitude_vector", "magnitude_vector.weight"), "magnitude"),
}


Parameters = dict[str, dict[str, "ndarray[Any, Any]"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraArrays:
    """The matrices of one module, in float32 as they were trained.

    Attributes:
        a: [rank, inputs].
        b: [outputs, rank].
        bias: [outputs], of the second matrix; None without one.
        magnitude: [outputs], the lengths of the weight's rows with DoRA; None without it.
        embedding: the module is an embedding, whose inputs are its tokens.
    """

    a: ndarray[Any, Any]
    b: ndarray[Any, Any]
    bias: ndarray[Any, Any] | None = None
    magnitude: ndarray[Any, Any] | None = None
    embedding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """A LoRA.

    Attributes:
        config: what it says of itself.
        modules: its matrices, by the names of their modules.
        saved: parameters of modules that were trained whole, by the names of modules and parameters.
        kept: parameters that PEFT has written though they are the base's, in the same way.
        tokens: ids of tokens and their vectors [ids, dimensions], by the names of embeddings and heads.
    """

    config: LoraConfig
    modules: Mapping[str, LoraArrays]
    saved: Parameters = field(default_factory=dict)
    kept: Parameters = field(default_factory=dict)
    tokens: Mapping[str, tuple[tuple[int, ...], ndarray[Any, Any]]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max((int(arrays.a.shape[0]) for arrays in self.modules.values()), default=0)


def read_lora(folder: Path, max_rank: int | None = None) -> LoraFile:
    """The LoRA in a folder. Blocks: it reads all of it.

    Raises:
        AdapterRefused: it is none, or a part of it is missing, superfluous, not finite or without effect.
    """
    config = read_lora_config(folder)
    tensors = read_tensors(check_weights_file(folder))
    found: dict[str, dict[str, Any]] = {}
    saved: Parameters = {}
    kept: Parameters = {}
    rows: dict[str, Any] = {}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            parts = found.setdefault(match["module"], {"embedding": False})
            parts["embedding"] |= "embedding" in match["part"]
            parts[_PARTS[match["part"]]] = tensor
        elif match := _TOKENS.fullmatch(key):
            rows[match["module"]] = tensor
        elif match := _WHOLE.fullmatch(key):
            whole = saved if match["module"].endswith(config.saved) else kept
            whole.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            raise AdapterRefused(f"{WEIGHTS_FILE} has {key}, which belongs to no LoRA of a module.")
    if not found:
        raise AdapterRefused(f"{WEIGHTS_FILE} is empty.")
    modules = {module: _checked(module, parts, config) for module, parts in found.items()}
    file = LoraFile(config=config, modules=modules, saved=saved, kept=kept, tokens=_with_ids(rows, config))
    _check_whole(file)
    if max_rank is not None and file.rank > max_rank:
        raise AdapterRefused(f"its rank is {file.rank}; adapters.max_rank of its base is {max_rank}.")
    return file


def _with_ids(rows: Mapping[str, Any], config: LoraConfig) -> dict[str, tuple[tuple[int, ...], Any]]:
    """The vectors of tokens with the ids that the configuration gives them."""
    import numpy as np

    found = {}
    for name, ids in config.tokens.items():
        module = next((known for known in rows if known not in found and known.endswith(name)), None)
        if module is None:
            of = f" of {name}" if name else ""
            raise AdapterRefused(f"{WEIGHTS_FILE} lacks the vectors of trainable_token_indices{of}.")
        vectors = rows[module]
        if vectors.ndim != 2 or len(vectors) != len(ids) or not np.isfinite(vectors).all():
            raise AdapterRefused(
                f"{WEIGHTS_FILE} has vectors of the shape {list(vectors.shape)} for the tokens of {module}; "
                f"trainable_token_indices has {len(ids)}, and they must be finite."
            )
        found[module] = (ids, vectors)
    for module in sorted(rows.keys() - found.keys()):
        raise AdapterRefused(f"{WEIGHTS_FILE} has vectors of tokens of {module}, which {CONFIG_FILE} does not name.")
    return found


def check_weights_file(folder: Path) -> Path:
    """The file with the tensors of an adapter.

    Raises:
        AdapterRefused: there is none.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / _PICKLE).is_file():
            raise AdapterRefused(f"its weights are a pickle ({_PICKLE}), which can run code; save {WEIGHTS_FILE}.")
        raise AdapterRefused(f"its folder has no {WEIGHTS_FILE}.")
    return folder / WEIGHTS_FILE


def _checked(module: str, parts: Mapping[str, Any], config: LoraConfig) -> LoraArrays:
    import numpy as np

    for part in ("a", "b"):
        if part not in parts:
            raise AdapterRefused(f"{WEIGHTS_FILE} lacks matrix {part.upper()} of {module}.")
    arrays = LoraArrays(**parts)
    rank = config.rank_of(module)
    if arrays.a.ndim != 2 or arrays.b.ndim != 2:
        raise NeedsMerge(f"the matrices of {module} have {arrays.a.ndim} dimensions")
    if not arrays.a.shape[0] == arrays.b.shape[1] == rank:
        raise AdapterRefused(
            f"the matrices of {module} have the ranks {arrays.a.shape[0]} and {arrays.b.shape[1]}; the configuration "
            f"says {rank}."
        )
    if (arrays.bias is not None) != config.bias:
        found = "no" if arrays.bias is None else "a"
        raise AdapterRefused(f"{module} has {found} bias of LoRA; lora_bias in {CONFIG_FILE} is {config.bias}.")
    if (arrays.magnitude is not None) != config.dora:
        found = "no" if arrays.magnitude is None else "a"
        raise AdapterRefused(f"{module} has {found} magnitude vector; use_dora in {CONFIG_FILE} is {config.dora}.")
    if arrays.magnitude is not None and arrays.magnitude.shape != arrays.b.shape[:1]:
        raise AdapterRefused(f"the magnitude vector of {module} has another length than its matrix B.")
    for array in (arrays.a, arrays.b, arrays.bias, arrays.magnitude):
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
    for name in file.config.saved:
        if not any(module.endswith(name) for module in file.saved):
            raise AdapterRefused(f"{WEIGHTS_FILE} has no weights of {name}, which is among modules_to_save.")
    if not (file.saved or file.config.dora or any(_has_effect(arrays) for arrays in file.modules.values())):
        raise AdapterRefused("all its matrices B are zero, so it is its base: it was not trained, or not loaded whole.")


def _has_effect(arrays: LoraArrays) -> bool:
    return bool(arrays.b.any()) or (arrays.bias is not None and bool(arrays.bias.any()))
