"""A LoRA on the modules of a loaded model: its matrices checked against them, and placed beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deployments.adapters.lora_file import WEIGHTS_FILE, LoraArrays, LoraFile
from deployments.adapters.refused import AdapterRefused


@dataclass(frozen=True, slots=True)
class Lora:
    """The matrices of one module: `y += (x @ a) @ b + bias`.

    Attributes:
        a: [inputs, rank]; of an embedding [tokens, rank].
        b: [rank, outputs], scaled.
        bias: [outputs], scaled; None without one.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.bias is None else self.bias.nbytes)


Loras = dict[str, Lora]
"""The matrices of an adapter by the names of their modules."""


def fit_lora(model: nn.Module, file: LoraFile, dtype: torch.dtype | None = None) -> Loras:
    """The LoRA of a file for the modules of a model, by their names.

    Args:
        model: the base.
        dtype: of the matrices; None takes the base's.

    Raises:
        AdapterRefused: a module is missing, is of another kind or has another shape, or a target has no matrices.
    """
    known = dict(model.named_modules())
    for name in sorted(set(file.modules) - set(known)):
        raise AdapterRefused(f"its base has no module {name}; it was trained on another model, or on another class.")
    _check_targets(model, known, file)
    return {name: _fit(name, known[name], arrays, file, dtype) for name, arrays in file.modules.items()}


def _check_targets(model: nn.Module, known: Mapping[str, nn.Module], file: LoraFile) -> None:
    """Refuse a file that lacks the matrices of a linear that its configuration names."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in known.items():
        is_linear = isinstance(module, nn.Linear | Conv1D)
        if not is_linear or name in file.modules or not file.config.is_target(name):
            continue
        if file.config.targets == "all-linear" and module is output:
            continue
        raise AdapterRefused(f"{WEIGHTS_FILE} lacks the matrices of {name}, which is among target_modules.")


def _fit(name: str, module: nn.Module, arrays: LoraArrays, file: LoraFile, dtype: torch.dtype | None) -> Lora:
    inputs, outputs, weight = _shape(name, module, arrays)
    if (arrays.a.shape[1], arrays.b.shape[0]) != (inputs, outputs):
        raise AdapterRefused(
            f"{name} takes {inputs} numbers and gives {outputs}; the adapter's matrices take {arrays.a.shape[1]} and "
            f"give {arrays.b.shape[0]}."
        )
    if dtype is None:
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
    scale = file.config.scale_of(name)

    def placed(array: Any, scale: float = 1.0) -> Tensor:
        tensor = torch.from_numpy(array.T.copy())
        return (tensor * scale).to(dtype).to(weight.device)

    bias = None if arrays.bias is None else placed(arrays.bias, scale)
    lora = Lora(placed(arrays.a), placed(arrays.b, scale), bias)
    for tensor in (lora.a, lora.b):
        if not tensor.isfinite().all():
            raise AdapterRefused(f"the matrices of {name} do not fit into {str(dtype).removeprefix('torch.')}.")
    return lora


def _shape(name: str, module: nn.Module, arrays: LoraArrays) -> tuple[int, int, Tensor]:
    """Inputs and outputs of a module, and its weight.

    Raises:
        AdapterRefused: the adapter's matrices are not for this kind of module.
    """
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) and arrays.embedding:
        return module.num_embeddings, module.embedding_dim, weight
    if arrays.embedding or not isinstance(module, nn.Linear | Conv1D):
        raise AdapterRefused(f"{name} is a {type(module).__name__}: LoRA is served on linears and embeddings.")
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, weight
    return weight.shape[0], weight.shape[1], weight
