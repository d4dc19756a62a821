"""The matrices of the sequences of a forward, put together so that few products compute the deltas of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from deployments.engine.adapters.lora import Lora
from deployments.engine.adapters.pieces import Second
from deployments.engine.adapters.step import Keys

MOST_ROWS = 16
"""Sequences up to which each has its own copy of its matrices: measured on a CPU, more are faster side by side."""


class Gathered(Second, Protocol):
    """The matrices of some sequences.

    Attributes:
        keys: of the sequences.
        rows: int64 [adapted], those that have an adapter here; None if all have.
        dtype: of the matrices.
        gain: [adapted, 1, outputs], see `Lora`; None if no sequence has one.
    """

    keys: Keys
    rows: Tensor | None
    dtype: torch.dtype
    gain: Tensor | None

    def follow(self, keys: Keys, loras: Mapping[str, Lora]) -> bool:
        """Become the matrices of other sequences at little cost; False if that cannot be."""

    def projected(self, x: Tensor, *, is_embedding: bool) -> Tensor:
        """[adapted, tokens, ranks] of inputs [adapted, tokens, inputs], or token ids [adapted, tokens]."""


def gather(keys: Keys, loras: Mapping[str, Lora]) -> Gathered | None:
    """The matrices of these sequences; None if no sequence has an adapter here."""
    count = sum(key in loras for key in keys)
    if not count:
        return None
    return StackedRows(keys, loras) if count <= MOST_ROWS else SideBySide(keys, loras)


class StackedRows:
    """Each sequence with its own copy, one after the other; see `Gathered`. Copies are made when sequences change."""

    def __init__(self, keys: Keys, loras: Mapping[str, Lora]) -> None:
        self.keys = keys
        self._loras = _own(keys, loras)
        first, count = self._loras[0], len(self._loras)
        self.dtype = first.a.dtype
        self.rows = _places(keys, loras, first.a.device)
        self._rank = max(lora.rank for lora in self._loras)
        # Zero beyond the rank of each. Inputs are summed in the order in which each alone sums them.
        self._a = first.a.new_zeros(count, self._rank, first.a.shape[0]).transpose(1, 2)
        self._b = first.b.new_zeros(count, self._rank, first.b.shape[1])
        self._bias, self.gain = _vectors(self._loras)
        for place, lora in enumerate(self._loras):
            self._put(place, lora)

    def follow(self, keys: Keys, loras: Mapping[str, Lora]) -> bool:
        own = _own(keys, loras)
        all_have = self.rows is None and len(own) == len(keys) == len(self._loras)
        if not all_have or max(lora.rank for lora in own) != self._rank:
            return False
        for place, lora in enumerate(own):
            if lora is not self._loras[place]:
                self._put(place, lora)
        self.keys, self._loras = keys, own
        self._bias, self.gain = _vectors(own)
        return True

    def projected(self, x: Tensor, *, is_embedding: bool) -> Tensor:
        if is_embedding:
            return torch.stack([functional.embedding(ids, a) for ids, a in zip(x, self._a, strict=True)])
        return torch.bmm(x, self._a)

    def outer(self, h: Tensor, own: slice) -> Tensor:
        b = self._b[own]
        return torch.bmm(h, b) if self._bias is None else torch.baddbmm(self._bias[own], h, b)

    def onto(self, base: Tensor, h: Tensor, own: slice) -> Tensor:
        return torch.baddbmm(base, h, self._b[own]) if self._bias is None else base + self.outer(h, own)

    def _put(self, place: int, lora: Lora) -> None:
        self._a[place].zero_()[:, : lora.rank].copy_(lora.a)
        self._b[place].zero_()[: lora.rank].copy_(lora.b)


class SideBySide:
    """The adapters of the sequences side by side, each once; see `Gathered`. A sequence sees its own columns alone."""

    def __init__(self, keys: Keys, loras: Mapping[str, Lora]) -> None:
        self._order = sorted({key for key in keys if key in loras})
        own = [loras[key] for key in self._order]
        self.dtype = own[0].a.dtype
        self._a = torch.cat([lora.a for lora in own], 1)
        self._b = torch.cat([lora.b for lora in own])
        owners = [place for place, lora in enumerate(own) for _ in range(lora.rank)]
        self._owners = torch.tensor(owners, device=self._a.device)
        self._biases, self._gains = _vectors(own)
        self._see(keys, loras)

    def _see(self, keys: Keys, loras: Mapping[str, Lora]) -> None:
        self.keys = keys
        self.rows = _places(keys, loras, self._a.device)
        of = torch.tensor([self._order.index(key) for key in keys if key in loras], device=self._a.device)
        self._seen = (of[:, None] == self._owners)[:, None]
        self._bias = None if self._biases is None else self._biases[of]
        self.gain = None if self._gains is None else self._gains[of]

    def follow(self, keys: Keys, loras: Mapping[str, Lora]) -> bool:
        if sorted({key for key in keys if key in loras}) != self._order:
            return False
        if sum(key in loras for key in keys) <= MOST_ROWS:
            return False
        self._see(keys, loras)
        return True

    def projected(self, x: Tensor, *, is_embedding: bool) -> Tensor:
        h = functional.embedding(x, self._a) if is_embedding else torch.matmul(x, self._a)
        # Not a product with zeros: what overflows in the columns of another sequence must not spread.
        return torch.where(self._seen, h, h.new_zeros(()))

    def outer(self, h: Tensor, own: slice) -> Tensor:
        delta = torch.matmul(h, self._b)
        return delta if self._bias is None else delta + self._bias[own]

    def onto(self, base: Tensor, h: Tensor, own: slice) -> Tensor:
        return base + self.outer(h, own)


def _own(keys: Keys, loras: Mapping[str, Lora]) -> list[Lora]:
    return [lora for key in keys if (lora := loras.get(key)) is not None]


def _places(keys: Keys, loras: Mapping[str, Lora], device: torch.device) -> Tensor | None:
    places = [i for i, key in enumerate(keys) if key in loras]
    return None if len(places) == len(keys) else torch.tensor(places, device=device)


def _vectors(loras: Sequence[Lora]) -> tuple[Tensor | None, Tensor | None]:
    """The biases and the gains."""
    return _stacked([lora.bias for lora in loras]), _stacked([lora.gain for lora in loras])


def _stacked(vectors: Sequence[Tensor | None]) -> Tensor | None:
    """[vectors, 1, outputs], zero where there is none; None if all are None."""
    given = next((vector for vector in vectors if vector is not None), None)
    if given is None:
        return None
    zero = torch.zeros_like(given)
    return torch.stack([zero if vector is None else vector for vector in vectors])[:, None]
