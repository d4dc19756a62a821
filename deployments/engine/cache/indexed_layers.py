"""A layer's cache for attention with an indexer: it keeps the keys of the indexer in addition to keys and values.

Takes the place of transformers' `DynamicIndexedLayer` (DSA: DeepSeek V3.2, GLM, Qwen4 …).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deployments.engine.cache.layers import KeyValueLayer


class _ClearLayer(KeyValueLayer):
    """Columns left of a sequence's first token are zero: some indexers (GLM-5) read in the keys which columns count."""

    def trim(self, lengths: Sequence[int], cuts: Sequence[int]) -> None:
        super().trim(lengths, cuts)
        for index, (length, cut) in enumerate(zip(lengths, cuts, strict=True)):
            if cut > min(cuts):
                self._clear(index, self.end - length)

    def append(self, other: KeyValueLayer, index: int, length: int, cut: int, width: int) -> None:
        super().append(other, index, length, cut, width)
        if other.is_initialized:
            self._clear(self.batch_size - 1, self.end - (length - cut))

    def drop(self, index: int) -> None:
        super().drop(index)
        if index < self.batch_size:
            self._clear(index, self.start)

    def _clear(self, index: int, end: int) -> None:
        """Overwrite the first columns of a sequence, up to `end`."""
        for buffer in self.buffers:
            buffer[index, :, :end] = 0


class IndexedLayer(KeyValueLayer):
    """Keys and values, the indexer's keys, and its positions if the model keeps those here.

    The model writes each of the three by itself, and a layer that shares another's index has only the first. So each
    is held by `KeyValueLayer` of its own, in the columns that all of them have.

    Args:
        capacity: columns to allocate at first; None leaves room for what comes.
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity=capacity)
        self.index = _ClearLayer(capacity=capacity)
        self.positions = KeyValueLayer(capacity=capacity)

    # What the model asks.

    @property
    def is_indexer_initialized(self) -> bool:
        return bool(self.index.is_initialized)

    @property
    def indexer_keys(self) -> Tensor | None:
        """The indexer's keys [rows, columns, dim]."""
        return self.index.keys[:, 0] if self.index.is_initialized else None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append new keys [rows, new columns, dim] and return all of them."""
        new = indexer_key_states[:, None]
        return self.index.update(new, new[..., :0])[0][:, 0]

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Positions [dims, rows, columns]."""
        return self.positions.keys[..., 0].movedim(1, 0) if self.positions.is_initialized else None

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: Tensor) -> None:
        """Append the last of `positions`, which begin with those that are here."""
        new = positions[..., self.positions.width :].movedim(0, 1)[..., None]
        self.positions.update(new, new[..., :0])

    # What the cache asks.

    @property
    def _parts(self) -> tuple[KeyValueLayer, KeyValueLayer]:
        return self.index, self.positions

    def reserve(self, new: int) -> None:
        super().reserve(new)
        for part in self._parts:
            part.reserve(new)

    def trim(self, lengths: Sequence[int], cuts: Sequence[int]) -> None:
        super().trim(lengths, cuts)
        for part in self._parts:
            if part.is_initialized:
                part.trim(lengths, cuts)

    def append(self, other: KeyValueLayer, index: int, length: int, cut: int, width: int) -> None:
        assert isinstance(other, IndexedLayer)
        super().append(other, index, length, cut, width)
        for mine, its in zip(self._parts, other._parts, strict=True):
            mine.append(its, index, length, cut, width)

    def drop(self, index: int) -> None:
        super().drop(index)
        for part in self._parts:
            part.drop(index)

    def resize(self, width: int) -> None:
        super().resize(width)
        for part in self._parts:
            part.resize(width)

    def rewind(self, width: int) -> None:
        super().rewind(width)
        for part in self._parts:
            part.rewind(width)

    def blank(self, index: int) -> None:
        super().blank(index)
        for part in self._parts:
            part.blank(index)

    def compact(self) -> None:
        super().compact()
        for part in self._parts:
            part.compact()

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(part.nbytes for part in self._parts)

    @property
    def column_bytes(self) -> int:
        return super().column_bytes + sum(part.column_bytes for part in self._parts)
