"""Positions of sequences of different ages, for decoders that read them off the length of the cache.

BART and its relatives take no position ids: they embed the positions that follow the length of the cache, the same for
all sequences. Inside the context their embedding is asked once for every age that occurs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deployments.engine.library.transformers_internals import length_name


class SequencePositions:
    """The position embedding of one decoder.

    Args:
        model: any model; `known` says whether there is something to do.
    """

    def __init__(self, model: Any) -> None:
        self._embedding: Any = _embedding(model)
        self._signature = inspect.signature(self._embedding.forward) if self._embedding is not None else None
        self._length = length_name(self._signature) if self._signature is not None else None

    @property
    def known(self) -> bool:
        return self._length is not None

    @contextmanager
    def for_lengths(self, lengths: Sequence[int]) -> Iterator[None]:
        """Let a forward of one token per sequence embed each one's own position, `lengths` tokens from the first."""
        if not self.known or len(set(lengths)) < 2:
            yield
            return
        with self._embedding.register_forward_hook(
            lambda module, args, kwargs, output: self._embedded(lengths, args, kwargs), with_kwargs=True
        ):
            yield

    def _embedded(self, lengths: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """[rows, 1, dim]."""
        assert self._signature is not None
        assert self._length is not None
        call = self._signature.bind(*args, **kwargs).arguments
        ages = sorted(set(lengths))
        each = [self._embedding.forward(**_at(call, self._length, age)).reshape(1, -1) for age in ages]
        return torch.cat(each)[[ages.index(length) for length in lengths], None]


def _at(call: dict[str, Any], length: str, age: int) -> dict[str, Any]:
    """The arguments of a call for a single sequence of an age, which is in the argument `length`."""
    changed = dict(call)
    for name, value in call.items():
        if name == length:
            changed[name] = age
        elif isinstance(value, torch.Size):
            changed[name] = torch.Size((1, *value[1:]))
        elif name == "position_ids" and isinstance(value, Tensor):
            changed[name] = torch.full_like(value.reshape(-1)[:1].reshape([1] * value.dim()), age)
        elif isinstance(value, Tensor):
            changed[name] = value[:1]
    return changed


def _embedding(model: Any) -> Any:
    """The position embedding of a model's decoder, or of the decoder of an encoder-decoder model inside it."""
    for _ in range(2):
        find = getattr(model, "get_decoder", None)
        model = find() if find is not None else None
        if hasattr(model, "embed_positions"):
            return model.embed_positions
    return None
