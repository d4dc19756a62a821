"""Deltas added to outputs a piece at a time, so that what lies between stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

PIECE = 1 << 17
"""Numbers of a piece: measured, a float32 delta of 512 KB and its sum still fit into the cache of one core."""

Outer = Callable[[Tensor, slice], Tensor]
"""The delta [sequences, tokens, outputs] of projected inputs [sequences, tokens, rank], which belong to the sequences
of the slice."""


def add_delta(output: Tensor, h: Tensor, outer: Outer) -> None:
    """Add a delta to an output, in place; each number is rounded once.

    Args:
        output: [sequences, tokens, outputs].
        h: [sequences, tokens, rank], the projected inputs.
        outer: the second product.
    """
    sequences, tokens, outputs = output.shape
    most = max(1, PIECE // outputs)
    if output.device.type != "cpu" or sequences * tokens <= most:
        output.add_(outer(h, slice(None)))
        return
    many = max(1, most // tokens)
    # Pieces of one length: a last one of few tokens could be multiplied by another kernel.
    length = -(-tokens // -(-tokens // most))
    for first in range(0, sequences, many):
        own = slice(first, first + many)
        for start in range(0, tokens, length):
            part = slice(start, start + length)
            output[own, part].add_(outer(h[own, part], own))
