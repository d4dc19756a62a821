"""The cache of a batch: transformers' own cache, its layers replaced by ones that sequences can join and leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deployments.engine.cache.indexed_layers import IndexedLayer
from deployments.engine.cache.layers import BatchLayer, HybridLayer, HybridSlidingLayer, KeyValueLayer, StateLayer
from deployments.engine.library.transformers_internals import (
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)


class UnknownLayer(TypeError):
    """A model's cache has a kind of layer that continuous batching does not support."""


class BatchCache(DynamicCache):  # type: ignore[misc]
    """Keys, values and states of sequences that end in the same column.

    Args:
        config: the model's configuration, which names the kind of each layer.
        capacity: columns to allocate at first; None leaves room for what comes.

    Attributes:
        lengths: tokens of each sequence in the cache.
        width: tokens of the longest sequence; the columns a query may see.

    Raises:
        UnknownLayer: the configuration names a layer that sequences cannot hold.
    """

    def __init__(self, config: Any, capacity: int | None = None) -> None:
        super().__init__(config=config)
        self.config = config
        self.layers: list[Any] = [_rows_layer(layer, capacity) for layer in self.layers]
        self.lengths: list[int] = []
        self.width = 0

    @property
    def held(self) -> list[BatchLayer]:
        return [layer for layer in self.layers if not isinstance(layer, DummyLayer)]

    @property
    def room(self) -> int:
        """Sequences that the buffers can hold."""
        return max(len(self.lengths), *(layer.room for layer in self.held))

    @property
    def has_states(self) -> bool:
        """Whether some layer keeps a state, which cannot be cropped to an earlier token."""
        return any(isinstance(layer, StateLayer) for layer in self.layers)

    @property
    def has_columns(self) -> bool:
        """Whether some layer keeps keys and values."""
        return any(isinstance(layer, KeyValueLayer) for layer in self.layers)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.held)

    def added(self, lengths: Sequence[int]) -> None:
        """After a forward: the tokens each sequence has now."""
        self.lengths, self.width = list(lengths), max(lengths)

    def add_column(self) -> None:
        """Count a column that other code than the layers has written after the last one, for every sequence."""
        for layer in self.held:
            layer.add_column()  # type: ignore[attr-defined]
        self.added([length + 1 for length in self.lengths])

    def trim(self, cuts: Sequence[int]) -> None:
        """Drop the last tokens of each sequence. Only for layers that keep all columns."""
        self.added([length - cut for length, cut in zip(self.lengths, cuts, strict=True)])
        for layer in self.held:
            layer.trim(self.lengths, cuts)  # type: ignore[attr-defined]

    def expect(self, rows: int, columns: int) -> None:
        """Allocate room for this many sequences at once when the next one joins, instead of for two, four and so on.

        Args:
            columns: tokens of the longest of them.
        """
        for layer in self.held:
            if isinstance(layer, KeyValueLayer):
                layer.expected = (rows, columns)

    def append(self, other: BatchCache, index: int, cut: int = 0) -> None:
        """Copy sequence `index` of `other`, without its last `cut` tokens, below the last sequence."""
        length = other.lengths[index]
        width = max(self.width, length - cut)
        for mine, theirs in zip(self.held, other.held, strict=True):
            mine.append(theirs, index, length, cut, width)
        self.lengths.append(length - cut)
        self.width = width

    def drop(self, index: int, *, blank: bool = False) -> None:
        """Remove a sequence; the last sequence takes its place, here and in `lengths`.

        Args:
            blank: the sequence may hold values that are not finite; overwrite them, as even hidden columns must be
                finite.
        """
        for layer in self.held:
            if blank:
                layer.blank(index)
            layer.drop(index)
        last = self.lengths.pop()
        if index < len(self.lengths):
            self.lengths[index] = last
        width = max(self.lengths, default=0)
        if 0 < width < self.width:
            for layer in self.held:
                layer.resize(width)
        self.width = width

    def compact(self) -> None:
        """Free the room for more sequences."""
        for layer in self.held:
            layer.compact()

    def rewind(self) -> None:
        """Drop what a failed forward has added. States cannot be restored: see `has_states`."""
        for layer in self.held:
            layer.rewind(self.width)

    def holds(self, index: int, cut: int) -> bool:
        """Whether sequence `index` can be copied without its last `cut` tokens."""
        return self.can_cut(self.lengths[index], cut)

    def can_cut(self, length: int, cut: int) -> bool:
        """Whether a sequence of `length` tokens can be copied without its last `cut` tokens."""
        return all(layer.holds(length, cut) for layer in self.held)

    def copy_sequence(self, index: int, cut: int = 0) -> BatchCache:
        """A new cache with sequence `index`, without its last `cut` tokens."""
        copy = BatchCache(self.config, capacity=self.lengths[index] - cut)
        copy.append(self, index, cut)
        return copy


class EncoderBatchCache(EncoderDecoderCache):  # type: ignore[misc]
    """Self-attention and cross-attention caches of the sequences of an encoder-decoder model.

    The encoder's keys and values are right-aligned as well, under a left-padded encoder mask: cross-attention knows
    no positions.
    """

    def __init__(self, config: Any, capacity: int | None = None) -> None:
        cross = BatchCache(config)
        # What is encoded is seen as a whole, whatever the window of the decoder's own tokens.
        cross.layers = [KeyValueLayer() for _ in cross.layers]
        super().__init__(BatchCache(config, capacity), cross)
        self.config = config

    @property
    def lengths(self) -> list[int]:
        lengths: list[int] = self.self_attention_cache.lengths
        return lengths

    @property
    def width(self) -> int:
        width: int = self.self_attention_cache.width
        return width

    @property
    def room(self) -> int:
        return int(self.self_attention_cache.room)

    @property
    def has_states(self) -> bool:
        return bool(self.self_attention_cache.has_states)

    @property
    def has_columns(self) -> bool:
        return bool(self.self_attention_cache.has_columns)

    @property
    def nbytes(self) -> int:
        return int(self.self_attention_cache.nbytes + self.cross_attention_cache.nbytes)

    def added(self, lengths: Sequence[int]) -> None:
        self.self_attention_cache.added(lengths)
        if not self.cross_attention_cache.lengths:
            encoded = next(layer.width for layer in self.cross_attention_cache.held)
            self.cross_attention_cache.added([encoded] * len(lengths))

    def expect(self, rows: int, columns: int) -> None:
        """See `BatchCache.expect`."""
        self.self_attention_cache.expect(rows, columns)
        self.cross_attention_cache.expect(rows, 0)

    def append(self, other: EncoderBatchCache, index: int, cut: int = 0) -> None:
        self.self_attention_cache.append(other.self_attention_cache, index, cut)
        self.cross_attention_cache.append(other.cross_attention_cache, index)
        self.is_updated: dict[int, bool] = dict(other.is_updated)

    def drop(self, index: int, *, blank: bool = False) -> None:
        self.self_attention_cache.drop(index, blank=blank)
        self.cross_attention_cache.drop(index, blank=blank)

    def compact(self) -> None:
        self.self_attention_cache.compact()
        self.cross_attention_cache.compact()

    def rewind(self) -> None:
        self.self_attention_cache.rewind()

    def holds(self, index: int, cut: int) -> bool:
        return bool(self.self_attention_cache.holds(index, cut))

    def copy_sequence(self, index: int, cut: int = 0) -> EncoderBatchCache:
        """A new cache with sequence `index`, without its last `cut` tokens."""
        copy = EncoderBatchCache(self.config, capacity=self.lengths[index] - cut)
        copy.append(self, index, cut)
        return copy


AnyCache = BatchCache | EncoderBatchCache


def keeps_all_columns(cache: AnyCache) -> bool:
    """Whether every layer has full attention, so that any token can be dropped and any column be written."""
    return isinstance(cache, BatchCache) and all(
        type(layer) is KeyValueLayer and not layer.is_sliding for layer in cache.layers
    )


def visible_columns(lengths: Tensor, width: int) -> Tensor:
    """Whether each of `width` columns holds a token of each sequence, `[rows, width]`; all end in the last one."""
    return torch.arange(width) >= width - lengths[:, None]


def new_cache(model: Any, capacity: int | None = None) -> AnyCache:
    """An empty cache for a model.

    Raises:
        UnknownLayer: the model's cache has a layer that sequences cannot hold.
    """
    config = model.config.get_text_config(decoder=True)
    return EncoderBatchCache(config, capacity) if model.config.is_encoder_decoder else BatchCache(config, capacity)


def _rows_layer(layer: Any, capacity: int | None) -> Any:
    """Our layer in place of transformers' own; classes are compared exactly, as a subclass may do anything."""
    kind = type(layer)
    if kind is DummyLayer:
        return layer
    if kind is DynamicLayer:
        return KeyValueLayer(capacity=capacity)
    if kind is DynamicIndexedLayer:
        return IndexedLayer(capacity)
    if kind is DynamicSlidingWindowLayer:
        return KeyValueLayer(layer.sliding_window, capacity)
    if kind is LinearAttentionLayer:
        return StateLayer(layer.number_of_states)
    if kind is LinearAttentionAndFullAttentionLayer:
        return HybridLayer(layer.number_of_states, capacity=capacity)
    if kind is LinearAttentionAndSlidingWindowAttentionLayer:
        return HybridSlidingLayer(layer.number_of_states, layer.sliding_window, capacity)
    raise UnknownLayer(f"cache layer {kind.__name__}")
