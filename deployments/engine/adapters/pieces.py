"""Deltas added to outputs a piece at a time, so that what lies between stays in the processor's cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PIECE = 1 << 18
"""Numbers of a piece. The C library maps new pages for tensors that are much larger: they take longer than the sums."""

LONG = 64
"""Tokens of a sequence from which oneDNN is faster than MKL."""

MOST_RANKS = 128
"""Products of so few numbers have the same bits in oneDNN and MKL: each is one sum, in their order."""

Outer = Callable[[Tensor, slice], Tensor]
"""The delta [sequences, tokens, outputs] of projected inputs [sequences, tokens, rank], which belong to the sequences
of the slice."""


def add_delta(output: Tensor, h: Tensor, outer: Outer, plain: Sequence[Tensor] | None = None) -> None:
    """Add a delta to an output, in place; each number is rounded once.

    Args:
        output: [sequences, tokens, outputs].
        h: [sequences, tokens, rank], the projected inputs.
        outer: the second product.
        plain: [rank, outputs] of each sequence, if its delta is the product with them and no more.
    """
    sequences, tokens, outputs = output.shape
    most = max(1, PIECE // outputs)
    if plain is not None and tokens >= LONG and _is_for_onednn(output, h) and same_bits():
        for own, projected, b in zip(output, h, plain, strict=True):
            for part in _parts(tokens, most):
                own[part] = _sum(projected[part], b, own[part])
    elif output.device.type != "cpu" or sequences * tokens <= most:
        output.add_(outer(h, slice(None)))
    else:
        many = max(1, most // tokens)
        for first in range(0, sequences, many):
            chosen = slice(first, first + many)
            for part in _parts(tokens, most):
                output[chosen, part].add_(outer(h[chosen, part], chosen))


def _parts(tokens: int, most: int) -> list[slice]:
    """Parts of one length: a last one of few tokens could be multiplied by another kernel."""
    length = -(-tokens // -(-tokens // most))
    return [slice(start, start + length) for start in range(0, tokens, length)]


def _is_for_onednn(output: Tensor, h: Tensor) -> bool:
    return output.device.type == "cpu" and h.dtype is torch.float32 and h.shape[-1] <= MOST_RANKS


def _sum(h: Tensor, b: Tensor, base: Tensor) -> Tensor:
    """A product and what it is added to, float32 [tokens, outputs], in one pass."""
    summed: Tensor = torch.ops.mkldnn._linear_pointwise.binary(h, base.float(), b.T, None, "add")
    return summed


@functools.cache
def same_bits() -> bool:
    """Whether oneDNN's product, added, has the bits of the usual one on this processor."""
    generator = torch.Generator().manual_seed(0)
    h, b, base = (torch.randn(shape, generator=generator) for shape in ((LONG, 16), (16, 96), (LONG, 96)))
    try:
        return torch.equal(_sum(h, b, base), base + h @ b)
    except (RuntimeError, AttributeError):  # a build of torch without it
        return False
