"""Deltas added to outputs a piece at a time, so that what lies between stays in the processor's cache."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

PIECE = 1 << 18
"""Numbers of a piece. The C library maps new pages for tensors that are much larger: they take longer than the sums."""

LONG = 64
"""Tokens of all sequences from which pieces, and oneDNN, are faster."""

MOST_RANKS = 128
"""Products of so few numbers have the same bits in oneDNN and MKL: each is one sum, in their order."""

_FEW = 16
"""Tokens of a sequence up to which a product that is added in one pass could have other bits."""


class Second(Protocol):
    """The second matrices of some sequences."""

    def outer(self, h: Tensor, own: slice) -> Tensor:
        """The delta [sequences, tokens, outputs] of projected inputs [sequences, tokens, rank] of some sequences."""

    def onto(self, base: Tensor, h: Tensor, own: slice) -> Tensor:
        """The same, added to float32 numbers [sequences, tokens, outputs]; it has the bits of the sum."""


def add_delta(output: Tensor, h: Tensor, second: Second) -> None:
    """Add a delta to an output, in place; each number is rounded once.

    Args:
        output: [sequences, tokens, outputs].
        h: [sequences, tokens, rank], the projected inputs.
        second: what they are multiplied by.
    """
    sequences, tokens, outputs = output.shape
    is_float = h.dtype is torch.float32 and output.dtype is not torch.float64
    if output.device.type != "cpu" or not is_float or tokens < _FEW or sequences * tokens < LONG:
        output.add_(second.outer(h, slice(None)))
        return
    most = max(1, PIECE // outputs)
    many = max(1, most // tokens)
    # Parts of one length: a last one of few tokens could be multiplied by another kernel.
    length = -(-tokens // -(-tokens // most))
    for first in range(0, sequences, many):
        own = slice(first, first + many)
        for start in range(0, tokens, length):
            part = slice(start, start + length)
            piece = output[own, part]
            piece.copy_(second.onto(piece.float(), h[own, part], own))


def product_onto(base: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """A product [1, tokens, outputs] of float32 matrices, and what it is added to."""
    if h.shape[-1] <= MOST_RANKS and onednn_has_the_bits():
        return _onednn(base[0], h[0], b)[None]
    return base + torch.matmul(h, b)


def _onednn(base: Tensor, h: Tensor, b: Tensor) -> Tensor:
    summed: Tensor = torch.ops.mkldnn._linear_pointwise.binary(h, base, b.T, None, "add")
    return summed


@functools.cache
def onednn_has_the_bits() -> bool:
    """Whether oneDNN's product, added, has the bits of the usual one on this processor."""
    generator = torch.Generator().manual_seed(0)
    h, b, base = (torch.randn(shape, generator=generator) for shape in ((LONG, 16), (16, 96), (LONG, 96)))
    try:
        return torch.equal(_onednn(base, h, b), base + h @ b)
    except (RuntimeError, AttributeError):  # a build of torch without it
        return False
