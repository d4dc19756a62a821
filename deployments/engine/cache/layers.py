"""One layer's cache for sequences that decode together.

Sequences are right-aligned: every sequence's last token lies in the same column, whatever its length, as in a
left-padded batch. Columns left of a sequence's first token hold leftovers that the attention mask hides. Buffers are
allocated with room to the right (tokens to come) and below (sequences to join), and allocated again when that room is
used up, so that a decode step writes one column and copies nothing.

The classes take the place of transformers' own cache layers and answer the model the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from deployments.engine.library.transformers_internals import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

_STATES = ("conv_states", "recurrent_states")


class BatchLayer(Protocol):
    """The interface of a layer; `lengths` are tokens per sequence, in the order of the sequences."""

    def append(self, other: Any, index: int, length: int, cut: int, width: int) -> None:
        """Copy sequence `index` of `other`, which has `length` tokens, below the last sequence, without its last `cut`
        tokens. The longest sequence has `width` tokens then.
        """

    def drop(self, index: int) -> None:
        """Remove a sequence; the last sequence takes its place."""

    def resize(self, width: int) -> None:
        """Drop the columns left of the longest sequence, which has `width` tokens now."""

    def rewind(self, width: int) -> None:
        """Drop the columns that a failed forward has added after `width`."""

    def holds(self, length: int, cut: int) -> bool:
        """Whether a sequence of `length` tokens can be copied without its last `cut`."""

    def blank(self, index: int) -> None:
        """Overwrite a sequence whose values may not be finite, as hidden columns must be."""

    def compact(self) -> None:
        """Give up the room for further sequences."""

    @property
    def room(self) -> int:
        """Sequences that the buffers can hold."""

    @property
    def nbytes(self) -> int: ...


def column_room(columns: int) -> int:
    """Columns a buffer gets that must hold `columns`: an eighth more, at least 64 and at most 512."""
    return -(-(columns + min(max(columns // 8, 64), 512)) // 32) * 32


def batch_room(rows: int) -> int:
    """Sequences a buffer gets that must hold `rows`: powers of two up to 8, then multiples of 8."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


class KeyValueLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values `[rows, heads, columns, dim]` of one attention layer.

    Args:
        sliding_window: tokens a query sees, its own included; None for full attention.
        capacity: columns to allocate at first; None leaves room for what comes.

    Attributes:
        expected: sequences, and columns of the longest, for which buffers get room at once when one joins.
    """

    is_croppable = False

    def __init__(self, sliding_window: int | None = None, capacity: int | None = None) -> None:
        DynamicLayer.__init__(self)
        self.is_sliding = sliding_window is not None
        self.keep = None if sliding_window is None else sliding_window - 1
        self.capacity = capacity
        self.batch_size = 0
        self.expected = (1, 0)
        self.width = 0
        self.start = 0
        self.end = 0
        self.buffers: list[Tensor] = []

    # What the model asks.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.batch_size = key_states.shape[0]
        self._begin([key_states, value_states], columns=key_states.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new columns and return all that a query of this forward may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.reserve(new)
        first, middle, self.end = self.start, self.end, self.end + new
        self.width += new
        self.buffers[0][: self.batch_size, :, middle : self.end].copy_(key_states)
        self.buffers[1][: self.batch_size, :, middle : self.end].copy_(value_states)
        self.start = self.end - self._kept(self.width)
        self._show(first)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self._kept(self.width)
        return kept + query_length, self.width - kept

    # What the cache asks.

    def reserve(self, new: int) -> None:
        """Make room for `new` columns."""
        if self.is_initialized and self.end + new > self.buffers[0].shape[2]:
            self._lay_out(self.buffers[0].shape[0], self._kept(self.width) + new)

    def move(self, buffers: Sequence[Tensor]) -> None:
        """Move to the first columns of other buffers, or of its own, which have room for the live ones."""
        window = self.end - self.start
        for old, new in zip(self.buffers, buffers, strict=True):
            live = old[: self.batch_size, :, self.start : self.end]
            if new is old:
                live = live.clone()
            else:
                new.zero_()
            new[: self.batch_size, :, :window] = live
        self.buffers, self.start, self.end = list(buffers), 0, window
        self._show(0)

    def next_column(self) -> list[Tensor]:
        """Views for a step: of the keys and the values that it writes, and of all that its queries see."""
        self.reserve(1)
        held = [buffer[: self.batch_size, :, self.start : self.end + 1] for buffer in self.buffers]
        return [*(each[:, :, -1:] for each in held), *held]

    def add_column(self) -> None:
        """Count the column that was written after the last one."""
        self.width += 1
        self.end += 1
        self.start = self.end - self._kept(self.width)
        self._show(self.start)

    def trim(self, lengths: Sequence[int], cuts: Sequence[int]) -> None:
        """Drop the last `cuts` of the `lengths` columns of each sequence; all end in the same column again."""
        self.end -= min(cuts)
        for index, (length, cut) in enumerate(zip(lengths, cuts, strict=True)):
            if by := cut - min(cuts):
                for buffer in self.buffers:
                    kept = buffer[index, :, self.end - by - length : self.end - by].clone()
                    buffer[index, :, self.end - length : self.end] = kept
        self.width = max(lengths)
        self.start = self.end - self.width
        self._show(self.start)

    def append(self, other: KeyValueLayer, index: int, length: int, cut: int, width: int) -> None:
        if not other.is_initialized:
            return
        kept, mine = self._kept(length - cut), self._kept(max(width, self.width))
        rows, columns = max(self.batch_size + 1, self.expected[0]), max(mine, self._kept(self.expected[1]))
        if not self.is_initialized:
            self._begin(other.buffers, columns=columns)
            self.start = self.end = columns
        if self.batch_size == self.buffers[0].shape[0] or self.end < mine:
            self._lay_out(batch_room(rows), columns, end=columns)
        last = other.end - cut
        for buffer, source in zip(self.buffers, other.buffers, strict=True):
            buffer[self.batch_size, :, self.end - kept : self.end] = source[index, :, last - kept : last]
        self.batch_size += 1
        self.width = max(width, self.width)
        self.start = self.end - mine
        self._show(self.start)

    def drop(self, index: int) -> None:
        if not self.is_initialized:
            return
        self.batch_size -= 1
        if index != self.batch_size:
            for buffer in self.buffers:
                buffer[index, :, self.start : self.end] = buffer[self.batch_size, :, self.start : self.end]
        if batch_room(2 * max(self.batch_size, 1)) < self.buffers[0].shape[0]:
            self._shrink(batch_room(max(self.batch_size, 1)))
        self._show(self.start)

    def resize(self, width: int) -> None:
        if self.is_initialized:
            self.width = width
            self.start = self.end - self._kept(width)
            if 2 * column_room(self.end - self.start) < self.buffers[0].shape[2]:
                self._shrink(self.buffers[0].shape[0])
            self._show(self.start)

    def rewind(self, width: int) -> None:
        if self.is_initialized and self.width > width:
            self.end -= self.width - width
            self.width = width
            self.start = self.end - self._kept(width)
            self._show(self.start)

    def holds(self, length: int, cut: int) -> bool:
        return cut == 0 or self.keep is None or length <= self.keep

    def blank(self, index: int) -> None:
        for buffer in self.buffers:
            buffer[index].zero_()

    def compact(self) -> None:
        if self.is_initialized and self.batch_size < self.buffers[0].shape[0]:
            self._shrink(self.batch_size)
            self._show(self.start)

    @property
    def room(self) -> int:
        return self.buffers[0].shape[0] if self.buffers else 0

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def column_bytes(self) -> int:
        """Bytes of one column of one sequence."""
        return sum(buffer[0, :, 0].nbytes for buffer in self.buffers)

    def _kept(self, width: int) -> int:
        return width if self.keep is None else min(width, self.keep)

    def _show(self, first: int) -> None:
        """Let `keys` and `values`, which some models read by themselves, be the live columns from `first` on."""
        self.keys, self.values = (buffer[: self.batch_size, :, first : self.end] for buffer in self.buffers)

    def _begin(self, like: Sequence[Tensor], columns: int) -> None:
        """Allocate buffers for at least `columns` columns of tensors like these `[rows, heads, columns, dim]`."""
        rows = max(self.batch_size, self.expected[0])
        columns = column_room(columns) if self.capacity is None else max(columns, self._kept(self.capacity))
        self.buffers = [t.new_zeros((rows, t.shape[1], columns, t.shape[3])) for t in like]
        self.dtype, self.device = like[0].dtype, like[0].device
        self.is_initialized = True

    def _shrink(self, rows: int) -> None:
        """Move to smaller buffers, unless there is no memory even for those."""
        with contextlib.suppress(RuntimeError):
            self._lay_out(rows, self.end - self.start)

    def _lay_out(self, rows: int, columns: int, end: int | None = None) -> None:
        """Move to buffers for `rows` sequences and `columns` columns; the window's last column becomes `end`."""
        window = self.end - self.start
        end = window if end is None else end
        # Both before either is put in place: an allocation that fails must leave the layer as it was.
        new = [old.new_zeros((rows, old.shape[1], column_room(columns), old.shape[3])) for old in self.buffers]
        for old, larger in zip(self.buffers, new, strict=True):
            larger[: self.batch_size, :, end - window : end] = old[: self.batch_size, :, self.start : self.end]
        self.buffers, self.start, self.end = new, end - window, end


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """Convolution and recurrent states of one layer, sequences in dimension 0; a state has no columns."""

    def __init__(self, number_of_states: int = 1) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.state_batch_size = 0
        self._room: dict[tuple[str, int], Tensor] = {}

    def append(self, other: StateLayer, index: int, length: int, cut: int, width: int) -> None:
        self._adopt()
        for name in _STATES:
            for key, source in getattr(other, name).items():
                if source is not None:
                    room = self._with_room((name, key), source)
                    room[self.state_batch_size] = source[index]
                    getattr(self, name)[key] = room[: self.state_batch_size + 1]
        self.state_batch_size += 1
        self.device, self.dtype = other.device, other.dtype  # type: ignore[has-type]
        for flags in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
            setattr(self, flags, dict(getattr(other, flags)))
        self.conv_kernel_size = dict(other.conv_kernel_size)  # type: ignore[has-type]

    def drop(self, index: int) -> None:
        self._adopt()
        self.state_batch_size -= 1
        for (name, key), room in self._room.items():
            room[index] = room[self.state_batch_size]
            getattr(self, name)[key] = room[: self.state_batch_size]

    def resize(self, width: int) -> None: ...

    def rewind(self, width: int) -> None: ...

    def holds(self, length: int, cut: int) -> bool:
        """A state belongs to its last token, so it cannot be cut."""
        return cut == 0

    def blank(self, index: int) -> None:
        """A dropped sequence's state is never read again."""

    def compact(self) -> None:
        """States are small and do not have columns, so they keep their room."""

    @property
    def room(self) -> int:
        return max((room.shape[0] for room in self._room.values()), default=0)

    @property
    def nbytes(self) -> int:
        return self.state_bytes

    @property
    def state_bytes(self) -> int:
        tensors = self._room.values() or [*self.conv_states.values(), *self.recurrent_states.values()]
        return sum(t.nbytes for t in tensors if t is not None)

    def _adopt(self) -> None:
        """Take over the states that a forward has made in an empty cache."""
        if self.state_batch_size:
            return
        for name in _STATES:
            for key, state in getattr(self, name).items():
                if state is not None:
                    self._room[name, key] = state
                    self.state_batch_size = state.shape[0]

    def _with_room(self, key: tuple[str, int], like: Tensor) -> Tensor:
        room = self._room.get(key)
        if room is None or self.state_batch_size == room.shape[0]:
            grown = like.new_empty((batch_room(self.state_batch_size + 1), *like.shape[1:]))
            if room is not None:
                grown[: self.state_batch_size] = room[: self.state_batch_size]
            self._room[key] = room = grown
        return room


class _StateAndKeyValueLayer(StateLayer, KeyValueLayer):  # type: ignore[misc]
    """A layer with both states and keys and values."""

    def __init__(
        self, number_of_states: int = 1, sliding_window: int | None = None, capacity: int | None = None
    ) -> None:
        KeyValueLayer.__init__(self, sliding_window, capacity)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # transformers tells the two apart in the same way: keys and values are positional.
        if args:
            KeyValueLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def append(self, other: Any, index: int, length: int, cut: int, width: int) -> None:
        StateLayer.append(self, other, index, length, cut, width)
        KeyValueLayer.append(self, other, index, length, cut, width)

    def drop(self, index: int) -> None:
        StateLayer.drop(self, index)
        KeyValueLayer.drop(self, index)

    # A state has neither columns nor room to give up.
    resize, rewind, blank = KeyValueLayer.resize, KeyValueLayer.rewind, KeyValueLayer.blank
    compact, room = KeyValueLayer.compact, KeyValueLayer.room

    @property
    def nbytes(self) -> int:
        return self.state_bytes + sum(buffer.nbytes for buffer in self.buffers)


class HybridLayer(_StateAndKeyValueLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer with states and full attention."""


class HybridSlidingLayer(_StateAndKeyValueLayer, LinearAttentionAndSlidingWindowAttentionLayer):  # type: ignore[misc]
    """A layer with states and a sliding window of keys and values."""
