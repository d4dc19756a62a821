"""Decode steps of a fixed shape, which a CUDA graph can replay and torch.compile need not compile again.

Such a step runs over whole KV buffers of its own: every row, every column. A batch moves into them, and sequences come
and go and columns fill up while no shape changes. When it has left or outgrown them, the step waits for the next batch
of its shape, so a server captures a handful of shapes once each (`_Shape`). What differs between steps, which is token
ids, positions, the column to be written and the first one that each sequence sees, is copied into one tensor that stays
where it is.

Only for models whose layers all have full attention through `sdpa` and that take positions; others decode as ever.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from deployments.config.engine import EngineOptions
from deployments.engine.cache.cache import BatchCache
from deployments.engine.cache.layers import KeyValueLayer
from deployments.engine.library.transformers_internals import DynamicCache, DynamicLayer
from deployments.engine.model.attention import planned_attention
from deployments.engine.model.forward import Forward, Offset
from deployments.engine.model.forward_hooks import listener
from deployments.engine.speedups.replayed_decode import ReplayedDecode, unsuited

logger = logging.getLogger(__name__)

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]
"""Makes of a step one that can be repeated: it returns the same tensor every time, with new numbers in it."""


class FixedDecode(ReplayedDecode):
    """Decodes like `Forward.decode`, in steps of a fixed shape where that is possible.

    Args:
        forward: the model's forward passes.
        capture: how a step is made repeatable.
        call: the model, or what computes the same.
        settled: steps that a shape must have been wanted for before a capture is worth its time.
        least_columns: of the smallest shape; a power of two.

    Attributes:
        memory: bytes that the buffers of all steps may have together.
        captured: how many steps were captured.
    """

    verb = "captured or compiled"

    def __init__(
        self, forward: Forward, capture: Capture, call: Any = None, settled: int = 0, least_columns: int = 512
    ) -> None:
        super().__init__(forward, listens=capture is not uncaptured or call is not None)
        self._capture = capture
        self._call = forward.model if call is None else call
        self._settled = settled
        self._least_columns = least_columns
        self._wanted: Counter[_Shape] = Counter()
        self._steps: list[_FixedStep] = []
        self.memory = 1 << 62
        self.captured = 0

    def _step(self, cache: BatchCache, dims: int) -> _FixedStep | None:
        """A step that the batch has moved into."""
        step = next((step for step in self._steps if step.holds(cache)), None)
        if step is not None and step.shape.dims == dims and step.has_room(cache):
            return step
        shape = _Shape(_rows(len(cache.lengths)), _columns(cache.width + 1, self._least_columns), dims)
        self._wanted[shape] += 1
        free = (step for step in self._steps if step.shape == shape and step.is_free)
        step = next(free, None)
        if step is None:
            if self._wanted[shape] <= self._settled or not self._makes_room(cache, shape):
                return None
            step = _FixedStep(self._forward, self._call, self._capture, cache, shape)
            self.captured += 1
        else:
            self._steps.remove(step)
        step.move_in(cache)
        # The one used last is the last to be freed.
        self._steps.append(step)
        return step

    def _makes_room(self, cache: BatchCache, shape: _Shape) -> bool:
        """Free the buffers of steps that no batch uses, until there is memory for another one."""
        needed = sum(layer.column_bytes for layer in _layers(cache)) * shape.rows * shape.columns
        while sum(step.nbytes for step in self._steps) + needed > self.memory:
            free = next((step for step in self._steps if step.is_free), None)
            if free is None:
                return False
            self._steps.remove(free)
        return True

    def forget(self) -> None:
        self._steps.clear()
        self._wanted.clear()


class _Shape(NamedTuple):
    """Of a step: rows and columns of its buffers, and position dimensions of its sequences."""

    rows: int
    columns: int
    dims: int


def _rows(count: int) -> int:
    """Rows of a step for some sequences: powers of two."""
    return 1 << (count - 1).bit_length()


def _columns(count: int, least: int) -> int:
    """Columns of a step for some tokens: powers of two from `least` on, and three quarters of them."""
    power = max(least, 1 << (count - 1).bit_length())
    return 3 * power // 4 if power > least and 4 * count <= 3 * power else power


def _layers(cache: BatchCache) -> list[KeyValueLayer]:
    return [layer for layer in cache.layers if isinstance(layer, KeyValueLayer)]


class _FixedStep:
    """One decode step over KV buffers of its own.

    Args:
        cache: a batch's, whose keys and values it is to have.

    Attributes:
        compared: how often it had the logits of an ordinary step.
        nbytes: of its buffers.
    """

    def __init__(self, forward: Forward, call: Any, capture: Capture, cache: BatchCache, shape: _Shape) -> None:
        device = forward.device
        self.shape = shape
        self.compared = 0
        self._repeat: Run | None = None
        self._call = call
        self._capture = capture
        self._batch: Callable[[], BatchCache | None] = lambda: None
        self._buffers = [
            [old.new_zeros((shape.rows, old.shape[1], shape.columns, old.shape[3])) for old in layer.buffers]
            for layer in _layers(cache)
        ]
        self.nbytes = sum(buffer.nbytes for buffers in self._buffers for buffer in buffers)
        self._given = torch.zeros(shape.rows * (2 + shape.dims) + 1, dtype=torch.long, device=device)
        of_rows, self._column = self._given[:-1].view(2 + shape.dims, shape.rows), self._given[-1:]
        self._first, positions = of_rows[1], of_rows[2:, :, None]
        self._columns = torch.arange(shape.columns, device=device)
        self._dtype = forward.model.dtype
        view = DynamicCache(config=cache.config)
        view.layers = [_Column(buffers, self._column) for buffers in self._buffers]
        self._arguments = {
            "input_ids": of_rows[0, :, None],
            "position_ids": positions[0] if shape.dims == 1 else positions,
            forward.cache_name: view,
            "use_cache": True,
            "return_dict": True,
        }

    @property
    def is_free(self) -> bool:
        """Whether no batch has its buffers."""
        cache = self._batch()
        return cache is None or not self.holds(cache)

    def holds(self, cache: BatchCache) -> bool:
        """Whether a batch has its keys and values here, in every layer."""
        return self._batch() is cache and all(
            layer.buffers[0] is buffers[0] for layer, buffers in zip(_layers(cache), self._buffers, strict=True)
        )

    def has_room(self, cache: BatchCache) -> bool:
        """Whether there is room for a column, for which its window may have to move to the left."""
        if cache.width >= self.shape.columns:
            return False
        if _layers(cache)[0].end == self.shape.columns:
            self.move_in(cache)
        return True

    def move_in(self, cache: BatchCache) -> None:
        """Let a batch have its keys and values here."""
        for layer, buffers in zip(_layers(cache), self._buffers, strict=True):
            layer.move(buffers)
        self._batch = ref(cache)

    def decode(self, token_ids: Sequence[int], offsets: Sequence[Offset], cache: BatchCache) -> Tensor:
        """See `ReplayedStep`; the first time, the step is captured."""
        self._load(token_ids, offsets, cache)
        if self._repeat is None:
            self._repeat = self._capture(self._run)
        return self._repeat()[: len(token_ids)]

    def _load(self, token_ids: Sequence[int], offsets: Sequence[Offset], cache: BatchCache) -> None:
        """Copy in what is new. Rows without a sequence see the new column alone, so that they stay finite; their
        position is 0, as some rotary embeddings follow the largest of a forward."""
        end, unused = _layers(cache)[0].end, self.shape.rows - len(token_ids)
        padding = [0] * unused
        given = [*token_ids, *padding, *(end - length for length in cache.lengths), *([end] * unused)]
        for dim in range(self.shape.dims):
            given += [length + offset[dim] for length, offset in zip(cache.lengths, offsets, strict=True)] + padding
        # Memory that is pinned is not given out again before the copy has ended.
        new = torch.tensor([*given, end], dtype=torch.long, pin_memory=self._given.is_cuda)
        self._given.copy_(new, non_blocking=True)

    def _run(self) -> Tensor:
        """Logits [rows of the buffers, vocab]."""
        hidden = (self._columns < self._first[:, None]) | (self._columns > self._column)
        # One mask of numbers for all layers; attention would make its own of truth values in each.
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
        mask = mask.masked_fill_(hidden, torch.finfo(self._dtype).min)[:, None, None]
        logits: Tensor = self._call(attention_mask=mask, **self._arguments).logits[:, -1]
        return logits


class _Column(DynamicLayer):  # type: ignore[misc]
    """A layer's buffers as a model sees them: it writes one column and reads all."""

    def __init__(self, buffers: Sequence[Tensor], column: Tensor) -> None:
        super().__init__()
        self.keys, self.values = buffers
        self.column = column
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) - 1


class CudaGraphs:
    """Captures steps as CUDA graphs; https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

    They share memory for what a step computes on its way: one is replayed after the other, and logits are used before
    the next replay.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        pool, self._pool = self._pool or torch.cuda.graph_pool_handle(), None
        aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), planned_attention():
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads, which encode images or serve another model, may allocate meanwhile.
        with planned_attention(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = run()
        # A pool that a capture has failed in is not used again.
        self._pool = pool

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def uncaptured(run: Run) -> Run:
    """A step as it is: torch.compile has its own ways to repeat."""
    return run


def fixed_decode(forward: Forward, options: EngineOptions) -> FixedDecode | None:
    """Fixed steps, compiled where asked for, as graphs on a GPU; None where there are none."""
    mode, reason = options.torch_compile, unsuited(forward)
    if mode is not None:
        reason = reason or listener(forward.model)
    if options.deterministic:
        reason = "deterministic mode has its own steps"
    if mode is not None and reason is not None:
        logger.warning("Engine option torch_compile=%r has no effect on this model: %s.", mode, reason)
    if reason is not None:
        return None
    if mode is not None:
        compiled: Any = torch.compile(forward.model, mode=None if mode == "default" else mode)
        return FixedDecode(forward, uncaptured, compiled)
    graphs = options.cuda_graphs and forward.device.type == "cuda"
    return FixedDecode(forward, CudaGraphs(), settled=4) if graphs else None
