"""Sequences that join a cache."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.cache.cache import BatchCache
from deployments.engine.cache.layers import KeyValueLayer
from tests.tiny import llama


def filled(length: int, seed: int) -> BatchCache:
    """A cache of one sequence."""
    cache = BatchCache(llama().config, capacity=length)
    torch.manual_seed(seed)
    for index in range(len(cache.layers)):
        cache.update(torch.randn(1, 2, length, 12), torch.randn(1, 2, length, 12), index)
    cache.added([length])
    return cache


@pytest.mark.parametrize("count", [2, 5, 16])
def test_expected_sequences_find_room(count: int) -> None:
    """The buffers are allocated once, and hold what they would have held."""
    sources = [filled(40 + seed, seed) for seed in range(count)]
    expecting, growing = (BatchCache(llama().config, capacity=128) for _ in range(2))
    expecting.expect(count, 40 + count)
    places = set()
    for source in sources:
        expecting.append(source, 0, 3)
        growing.append(source, 0, 3)
        places.add(tuple(layer.buffers[0].data_ptr() for layer in expecting.layers))
    expecting.drop(0)
    growing.drop(0)
    assert len(places) == 1
    assert expecting.lengths == growing.lengths
    for mine, other in zip(expecting.layers, growing.layers, strict=True):
        assert isinstance(mine, KeyValueLayer)
        for row, length in enumerate(expecting.lengths):
            assert torch.equal(mine.keys[row, :, -length:], other.keys[row, :, -length:])
            assert torch.equal(mine.values[row, :, -length:], other.values[row, :, -length:])
