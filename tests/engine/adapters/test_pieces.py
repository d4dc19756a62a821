"""A delta that is added a piece at a time, against one that is added at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deployments.engine.adapters.gathered import gather
from deployments.engine.adapters.lora import Lora
from deployments.engine.adapters.pieces import (
    LONG,
    MOST_RANKS,
    PIECE,
    add_delta,
    onednn_has_the_bits,
    product_onto,
)

OUTPUTS, RANK = 512, 16
MOST = PIECE // OUTPUTS
"""Tokens of a piece."""

pytestmark = pytest.mark.usefixtures("one_thread")


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int) -> Lora:
    # As they come from files: transposed.
    return Lora(made(RANK, 64, seed=seed).T, made(OUTPUTS, RANK, seed=seed + 1).T)


@pytest.mark.parametrize("tokens", [LONG - 1, LONG, MOST, MOST + 1, 2 * MOST, 3 * MOST + 5])
def test_bits_of_one_adapter(tokens: int) -> None:
    own, h = lora(0), made(1, tokens, RANK)
    output = made(1, tokens, OUTPUTS, seed=1).bfloat16()
    expected = (output.float() + h @ own.b).bfloat16()
    add_delta(output, h, own)
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("sequences", "tokens"), [(2, 3), (8, MOST // 4), (3, MOST), (3, MOST + 1), (20, MOST // 4), (5, 16)]
)
def test_bits_of_several(sequences: int, tokens: int) -> None:
    loras = {f"a{i}": lora(i) for i in range(3)}
    gathered = gather(tuple(f"a{i % 3}" for i in range(sequences)), loras)
    assert gathered is not None
    h = gathered.projected(made(sequences, tokens, 64), is_embedding=False)
    output = made(sequences, tokens, OUTPUTS, seed=1).bfloat16()
    expected = (output.float() + gathered.outer(h, slice(None))).bfloat16()
    add_delta(output, h, gathered)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("rank", [1, 3, 16, MOST_RANKS])
def test_ranks_have_the_same_bits_in_both_kernels(rank: int) -> None:
    assert onednn_has_the_bits(), "not this processor"
    h, b, base = made(1, 100, rank), made(OUTPUTS, rank, seed=1).T, made(1, 100, OUTPUTS, seed=2)
    assert torch.equal(product_onto(base, h, b), base + h @ b)


def test_no_piece_is_much_smaller_than_the_others() -> None:
    lengths = []

    class Zero:
        def outer(self, h: Tensor, own: slice) -> Tensor:
            raise AssertionError("not a piece")

        def onto(self, base: Tensor, h: Tensor, own: slice) -> Tensor:
            lengths.append(h.shape[1])
            return base

    add_delta(made(1, 2 * MOST + 1, OUTPUTS), made(1, 2 * MOST + 1, RANK), Zero())
    assert sum(lengths) == 2 * MOST + 1
    assert max(lengths) - min(lengths) < len(lengths)
