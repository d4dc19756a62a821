"""Vectors of single tokens that an adapter has trained, in an embedding or in a head (trainable_token_indices).

https://huggingface.co/docs/peft/package_reference/trainable_tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.adapters.lora_file import LoraFile
from deployments.adapters.refused import AdapterRefused


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The vectors of some tokens in place of the base's.

    Attributes:
        ids: int64 [ids].
        vectors: [ids, dimensions], as the module gives them or multiplies by them.
        bias: [ids], of a head; None without one.
        embeds: the module is an embedding, not a head.
    """

    ids: Tensor
    vectors: Tensor
    bias: Tensor | None
    embeds: bool

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def applied(self, input: Tensor, output: Tensor) -> Tensor:
        """What the module gives with these vectors, of what it is given and gives without."""
        if not self.embeds:
            output[..., self.ids] = functional.linear(input, self.vectors, self.bias).to(output.dtype)
            return output
        hits = input[..., None] == self.ids
        own = self.vectors[hits.int().argmax(-1)]
        return torch.where(hits.any(-1, keepdim=True), own, output)


def fit_tokens(model: nn.Module, known: Mapping[str, nn.Module], file: LoraFile) -> dict[str, TokenRows]:
    """The vectors of a file, on the devices of the base's and in their dtypes; also for a head that is tied.

    Args:
        known: the modules of the base, by name.

    Raises:
        AdapterRefused: a module is missing, is of another kind or shape, or has no such token.
    """
    names = {module: name for name, module in known.items()}
    rows = {}
    for name, (ids, vectors) in file.tokens.items():
        module = known.get(name)
        rows[name] = _rows(name, module, ids, vectors)
        for head in _tied(model, module):
            rows[names[head]] = _rows(names[head], head, ids, vectors)
    return rows


def _tied(model: Any, embedding: Any) -> Iterator[Any]:
    """The head that has the weight of an embedding; a packed one has a copy of it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight: Any = getattr(head, "weight", None)
    own: Any = getattr(embedding, "weight", None)
    if weight is None or head is embedding or own is None or weight.shape != own.shape:
        return
    if weight is own or (weight.is_mkldnn and torch.equal(weight.to_dense(), own)):
        yield head


def _rows(name: str, module: Any, ids: tuple[int, ...], vectors: Any) -> TokenRows:
    if not isinstance(module, nn.Embedding | nn.Linear):
        raise AdapterRefused(f"it has vectors of tokens of {name}, which is not an embedding or a head of its base.")
    weight: Any = module.weight
    count, width = weight.shape
    if vectors.shape[1] != width or not all(0 <= token < count for token in ids):
        raise AdapterRefused(
            f"its vectors of tokens have {vectors.shape[1]} numbers and ids up to {max(ids)}; {name} has {width} "
            f"numbers for each of {count} tokens."
        )
    places = torch.tensor(ids, device=weight.device)
    own = torch.from_numpy(vectors.copy()).to(weight.dtype).to(weight.device)
    if isinstance(module, nn.Embedding):
        scale: Any = getattr(module, "embed_scale", None)
        return TokenRows(places, own if scale is None else own * scale.to(own), None, embeds=True)
    return TokenRows(places, own, None if module.bias is None else module.bias.detach()[places], embeds=False)
