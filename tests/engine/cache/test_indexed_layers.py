"""What an indexer finds in the columns that its sequences do not have."""

from __future__ import annotations

import torch

from deployments.engine.cache.indexed_layers import IndexedLayer


def filled(rows: int, columns: int) -> IndexedLayer:
    layer = IndexedLayer()
    layer.update(torch.ones(rows, 2, columns, 4), torch.ones(rows, 2, columns, 4))
    layer.update_indexer(torch.ones(rows, columns, 3))
    return layer


def shown(layer: IndexedLayer) -> list[list[int]]:
    """For each sequence and column, whether there is anything."""
    assert layer.indexer_keys is not None
    return layer.indexer_keys.ne(0).any(-1).int().tolist()


def test_a_sequence_in_the_place_of_a_longer_one_has_only_its_own_columns() -> None:
    layer = filled(2, 5)
    layer.drop(1)
    layer.append(filled(1, 3), 0, 3, 0, 5)
    assert shown(layer) == [[1] * 5, [0, 0, 1, 1, 1]]


def test_a_sequence_that_moves_has_only_its_own_columns() -> None:
    layer = filled(2, 5)
    layer.append(filled(1, 2), 0, 2, 0, 5)
    layer.drop(0)
    layer.drop(1)
    layer.resize(2)
    layer.append(filled(1, 5), 0, 5, 0, 5)
    assert shown(layer) == [[0, 0, 0, 1, 1], [1] * 5]


def test_a_sequence_that_takes_back_more_than_others_has_only_its_own_columns() -> None:
    layer = filled(2, 6)
    layer.trim([5, 3], [1, 3])
    assert shown(layer) == [[1] * 5, [0, 0, 1, 1, 1]]
