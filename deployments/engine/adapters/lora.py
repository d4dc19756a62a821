"""A LoRA on the modules of a loaded model: its matrices checked against them, and placed beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deployments.adapters.lora_file import WEIGHTS_FILE, LoraArrays, LoraFile
from deployments.adapters.refused import AdapterRefused, NeedsMerge
from deployments.engine.adapters.pieces import product_onto
from deployments.engine.adapters.saved import Saved, fit_saved
from deployments.engine.adapters.token_rows import TokenRows, fit_tokens


@dataclass(frozen=True, slots=True)
class Lora:
    """The matrices of one module: `y += (x @ a) @ b + bias + gain * (y - own bias)`.

    Attributes:
        a: [inputs, rank]; of an embedding [tokens, rank].
        b: [rank, outputs], scaled.
        bias: [outputs], scaled; None without one.
        gain: [outputs], what DoRA multiplies the base's product by, less 1; None without DoRA.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    gain: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.a, self.b, self.bias, self.gain) if tensor is not None)

    def outer(self, h: Tensor, own: slice) -> Tensor:
        """The delta of projected inputs, without the gain's part; see `pieces.Second`."""
        delta = torch.matmul(h, self.b)
        return delta if self.bias is None else delta.add_(self.bias)

    def onto(self, base: Tensor, h: Tensor, own: slice) -> Tensor:
        """The same, added to something."""
        return product_onto(base, h, self.b) if self.bias is None else base + self.outer(h, own)


@dataclass(frozen=True, slots=True)
class Fitted:
    """An adapter for the modules of a model.

    Attributes:
        loras: the matrices, by the names of their modules.
        saved: modules that replace the base's, by name.
        tokens: vectors of single tokens, by the names of embeddings and heads.
    """

    loras: Mapping[str, Lora]
    saved: Saved
    tokens: Mapping[str, TokenRows]

    @property
    def modules(self) -> frozenset[str]:
        """The names of the modules that it changes."""
        return frozenset({*self.loras, *self.saved, *self.tokens})

    @property
    def nbytes(self) -> int:
        whole = sum(parameter.nbytes for module in self.saved.values() for parameter in module.parameters())
        tokens = sum(rows.nbytes for rows in self.tokens.values())
        return whole + tokens + sum(lora.nbytes for lora in self.loras.values())


def fit_lora(model: nn.Module, file: LoraFile, dtype: torch.dtype = torch.float32) -> Fitted:
    """The adapter of a file for the modules of a model.

    Args:
        model: the base.
        dtype: of the matrices, in which the delta is computed.

    Raises:
        AdapterRefused: a module is missing, is of another kind or has another shape, or a target has no matrices.
    """
    known = dict(model.named_modules())
    for name in sorted(set(file.modules) - set(known)):
        raise AdapterRefused(f"its base has no module {name}; it was trained on another model, or on another class.")
    _check_targets(model, known, file)
    loras = {name: _fit(name, known[name], arrays, file, dtype) for name, arrays in file.modules.items()}
    return Fitted(loras, fit_saved(known, file), fit_tokens(model, known, file))


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


def _fit(name: str, module: nn.Module, arrays: LoraArrays, file: LoraFile, dtype: torch.dtype) -> Lora:
    inputs, outputs, weight = _shape(name, module, arrays)
    if (arrays.a.shape[1], arrays.b.shape[0]) != (inputs, outputs):
        raise AdapterRefused(
            f"{name} takes {inputs} numbers and gives {outputs}; the adapter's matrices take {arrays.a.shape[1]} and "
            f"give {arrays.b.shape[0]}."
        )
    scale = file.config.scale_of(name)

    gain = None if arrays.magnitude is None else _dora_gain(name, module, arrays, scale)

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(weight.device)

    # As PEFT multiplies by them: with the numbers in another order, products would be summed in another order.
    a, b = (torch.from_numpy(matrix.copy()).T for matrix in (arrays.a, arrays.b))
    b = b.to(weight.device) * (scale if gain is None else scale * gain)
    lora = Lora(
        a=placed(a.contiguous() if isinstance(module, nn.Embedding) else a),
        b=placed(b),
        bias=None if arrays.bias is None else placed(torch.from_numpy(arrays.bias) * scale),
        gain=None if gain is None else placed(gain - 1),
    )
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
        raise NeedsMerge(f"{name} is a {type(module).__name__}, not a linear or an embedding")
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, weight
    return weight.shape[0], weight.shape[1], weight


def _dora_gain(name: str, module: nn.Module, arrays: LoraArrays, scale: float) -> Tensor:
    """What DoRA multiplies each output by, float32 [outputs]: the trained length of the weight's row over its length.

    Raises:
        AdapterRefused: the weight cannot be read as numbers.
    """
    weight: Any = module.weight
    if isinstance(module, nn.Embedding) or not weight.dtype.is_floating_point:
        if isinstance(module, nn.Embedding):
            raise NeedsMerge(f"it uses DoRA on {name}, an embedding")
        raise AdapterRefused(f"it uses DoRA, and {name} is quantized ({weight.dtype}); serve an unquantized base.")
    dense = (weight.to_dense() if weight.is_mkldnn else weight).detach().float()
    rows = dense.T if isinstance(module, Conv1D) else dense
    product = torch.from_numpy(arrays.b).to(rows) @ torch.from_numpy(arrays.a).to(rows)
    gain: Tensor = torch.from_numpy(arrays.magnitude).to(rows) / (rows + scale * product).norm(dim=1)
    return gain
