"""Modules that an adapter has whole (`modules_to_save`), in the place of the base's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deployments.adapters.lora_file import WEIGHTS_FILE, LoraFile
from deployments.adapters.refused import AdapterRefused, NeedsMerge

Saved = dict[str, nn.Module]
"""The modules of an adapter by their names in the base."""


def fit_saved(known: Mapping[str, nn.Module], file: LoraFile) -> Saved:
    """The modules of a file, on the devices of the base's and in their dtypes.

    Args:
        known: the modules of the base, by name.

    Raises:
        AdapterRefused: a module is missing, is of another kind or shape, or would have to be the base's and is not.
    """
    for name, parameters in file.kept.items():
        _check_kept(name, known.get(name), parameters)
    return {name: _fit(name, known.get(name), parameters) for name, parameters in file.saved.items()}


def _fit(name: str, module: nn.Module | None, parameters: Mapping[str, Any]) -> nn.Module:
    if module is None:
        raise AdapterRefused(f"its base has no module {name}; it was trained on another model, or on another class.")
    if not isinstance(module, nn.Linear | Conv1D | nn.Embedding) and "Norm" not in type(module).__name__:
        raise NeedsMerge(f"it replaces {name}, a {type(module).__name__} (modules_to_save)")
    own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    if own.keys() != parameters.keys():
        raise AdapterRefused(f"{WEIGHTS_FILE} has {sorted(parameters)} of {name}; its base has {sorted(own)}.")
    replaced = copy.copy(module)
    vars(replaced).pop("forward", None)  # a packed one has the base's weight
    replaced._parameters = dict(module._parameters)
    for key, array in parameters.items():
        if tuple(array.shape) != tuple(own[key].shape):
            raise AdapterRefused(
                f"{name}.{key} has the shape {list(array.shape)}; the base's is {list(own[key].shape)}."
            )
        replaced._parameters[key] = nn.Parameter(_like(array, own[key]), requires_grad=False)
    return replaced


def _check_kept(name: str, module: nn.Module | None, parameters: Mapping[str, Any]) -> None:
    """PEFT writes the weight of an embedding that has a LoRA; one that differs from the base's has been trained."""
    for key, array in parameters.items():
        own: Any = None if module is None else module._parameters.get(key)
        dense = own.to_dense() if own is not None and own.is_mkldnn else own
        if dense is None or tuple(array.shape) != tuple(dense.shape) or not torch.equal(_like(array, own), dense):
            raise AdapterRefused(
                f"{WEIGHTS_FILE} has another {name}.{key} than its base, and {name} is not among modules_to_save."
            )


def _like(array: Any, parameter: Tensor) -> Tensor:
    return torch.from_numpy(array.copy()).to(parameter.dtype).to(parameter.device)
