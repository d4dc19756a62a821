"""A module of the base with the matrices of its adapters: what its forward gives is the base's, and a delta.

The base's product is untouched. The delta has one of three forms:

- one: all sequences have the same adapter; two plain products.
- rows: each sequence has its own; their matrices are gathered for as long as the sequences stay the same, see
  `gathered`.
- row by row: the same, each sequence by itself, if its bits must not depend on the others.

A sequence without an adapter gets the base's output as it is. An adapter that has the whole module, in place of a
delta, computes its sequences with that, one adapter after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.engine.adapters.gathered import Gathered, gather
from deployments.engine.adapters.lora import Lora
from deployments.engine.adapters.pieces import add_delta
from deployments.engine.adapters.step import Keys, current_step
from deployments.engine.adapters.token_rows import TokenRows


class AdaptedModule:
    """Stands in for the forward of a module while a forward with adapters runs.

    Args:
        module: of the base; its forward, which may be a packed one, computes the base's part.
        row_by_row: every sequence's delta is computed by itself.

    Attributes:
        loras: by the adapter's version.
        saved: modules that replace this one, in the same way.
        tokens: vectors of single tokens, in the same way.
        is_embedding: its inputs are token ids.
    """

    def __init__(self, module: nn.Module, *, row_by_row: bool) -> None:
        self.module = module
        self.loras: dict[str, Lora] = {}
        self.saved: dict[str, nn.Module] = {}
        self.tokens: dict[str, TokenRows] = {}
        self.is_embedding = isinstance(module, nn.Embedding)
        self._forward: Callable[..., Tensor] = module.forward
        self._row_by_row = row_by_row
        self._gathered: Gathered | None = None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the module for the sequences of this thread's forward."""
        output = self._forward(input, *args, **kwargs)
        step = current_step()
        if step is None:
            return output
        step.used = True
        output = output.contiguous()  # It is added to in place, by views.
        if self.saved:
            output = self._replaced(step.keys, output, (input, *args), kwargs)
        if self.tokens:
            output = self._with_tokens(step.keys, input, output)
        if self._row_by_row and len(step.keys) > 1:
            return self._each(step.keys, input, output)
        if step.shared is None:
            return self._rows(step.keys, input, output)
        lora = self.loras.get(step.shared)
        return output if lora is None else self._add(input, output, lora)

    def forget(self, key: str) -> None:
        """Drop the matrices of an adapter."""
        self.loras.pop(key, None)
        self.saved.pop(key, None)
        self.tokens.pop(key, None)
        self._gathered = None

    def _replaced(self, keys: Keys, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output, with that of another module where an adapter has one."""
        for key in dict.fromkeys(keys):
            module = self.saved.get(key)
            if module is None:
                continue
            if len(set(keys)) == 1 and not (self._row_by_row and len(keys) > 1):
                replaced: Tensor = module.forward(*args, **kwargs)
                return replaced
            rows = [i for i, own in enumerate(keys) if own == key]
            for chosen in [[i] for i in rows] if self._row_by_row else [rows]:
                own = [value[chosen] if isinstance(value, Tensor) else value for value in args]
                output[chosen] = module.forward(*own, **kwargs).to(output.dtype)
        return output

    def _with_tokens(self, keys: Keys, input: Tensor, output: Tensor) -> Tensor:
        """The output, with the vectors that adapters have for single tokens."""
        for key in dict.fromkeys(keys):
            tokens = self.tokens.get(key)
            if tokens is None:
                continue
            if len(set(keys)) == 1 and not (self._row_by_row and len(keys) > 1):
                return tokens.applied(input, output)
            rows = [i for i, own in enumerate(keys) if own == key]
            for chosen in [[i] for i in rows] if self._row_by_row else [rows]:
                output[chosen] = tokens.applied(input[chosen], output[chosen])
        return output

    def _rows(self, keys: Keys, input: Tensor, output: Tensor) -> Tensor:
        gathered = self._gathered
        if gathered is None or not (gathered.keys == keys or gathered.follow(keys, self.loras)):
            gathered = self._gathered = gather(keys, self.loras)
        if gathered is None:
            return output
        rows = gathered.rows
        x = input if rows is None else input.index_select(0, rows)
        own = output if rows is None else output.index_select(0, rows)
        flat = own.view(len(own), -1, own.shape[-1])
        if self.is_embedding:
            h = gathered.projected(x, is_embedding=True)
            flat.add_(gathered.outer(h, slice(None)).mul_(_scale_of(self.module)))
        else:
            h = gathered.projected(x.flatten(1, -2).to(gathered.dtype), is_embedding=False)
            if gathered.gain is None:
                add_delta(flat, h, gathered)
            else:
                flat.add_(gathered.outer(h, slice(None)) + self._product(flat) * gathered.gain)
        return own if rows is None else output.index_copy_(0, rows, own)

    def _each(self, keys: Keys, input: Tensor, output: Tensor) -> Tensor:
        for i, key in enumerate(keys):
            lora = self.loras.get(key)
            if lora is not None:
                self._add(input[i : i + 1], output[i : i + 1], lora)
        return output

    def _add(self, input: Tensor, output: Tensor, lora: Lora) -> Tensor:
        """The output with the delta of one adapter, in place."""
        if self.is_embedding:
            delta = torch.matmul(functional.embedding(input, lora.a), lora.b)
            return output.add_(delta.mul_(_scale_of(self.module)))
        h = torch.matmul(input.to(lora.a.dtype), lora.a)
        if lora.gain is None:
            # All tokens in a row: the adapter is the same.
            add_delta(output.view(1, -1, output.shape[-1]), h.view(1, -1, lora.rank), lora)
            return output
        return output.add_(lora.outer(h, slice(None)).add_(self._product(output) * lora.gain))

    def _product(self, output: Tensor) -> Tensor:
        """The base's output without the base's bias."""
        bias: Any = getattr(self.module, "bias", None)
        return output if bias is None else output - bias


def _scale_of(module: nn.Module) -> Any:
    """What an embedding multiplies its vectors by, as Gemma's does."""
    scale = getattr(module, "embed_scale", None)
    return 1.0 if scale is None else scale
