"""Decode steps of a fixed shape, which a CUDA graph can replay and torch.compile need not compile again.

Such a step runs over whole buffers: every row, every column. Sequences come and go and columns fill up
while no shape changes, so one capture serves until the buffers are laid out anew; `batch_room` and `column_room` are
the buckets. What differs between steps, which is token ids, positions, mask and the column to be written, is copied
into tensors that stay where they are.

Only for models whose layers all have full attention through `sdpa` and that take positions; others decode as ever. So
do all models once a capture has failed or the first steps of a shape have had other logits than ordinary ones, and
those that a loader has attached hooks to, which a replay would not call (`listeners`). After memory ran out, steps are
ordinary for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deployments.config.engine import EngineOptions
from deployments.engine.base.failures import causes, free_memory, is_out_of_memory, raise_if_lost
from deployments.engine.cache.cache import AnyCache, BatchCache, keeps_all_columns, new_cache
from deployments.engine.cache.layers import KeyValueLayer
from deployments.engine.library.transformers_internals import DynamicCache, DynamicLayer
from deployments.engine.model.forward import Forward, Offset
from deployments.engine.model.forward_hooks import free_hooks, listener
from deployments.engine.verify.proofs import close

logger = logging.getLogger(__name__)

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]
"""Makes of a step one that can be repeated: it returns the same tensor every time, with new numbers in it."""

_CHECKED = 2
"""Steps of every shape that are compared with ordinary ones; the second has other inputs than its capture."""
_ORDINARY_STEPS = 256
"""Steps that are ordinary after memory ran out."""


class FixedDecode:
    """Decodes like `Forward.decode`, in steps of a fixed shape where that is possible.

    Args:
        forward: the model's forward passes.
        capture: how a step is made repeatable.
        call: the model, or what computes the same.
        settled: decode steps that buffers must have lasted before a capture is worth its time.

    Attributes:
        reason: why there are no fixed steps (any more); None while there are.
        captured: how many steps were captured.
        repeated: how many decode steps were of a fixed shape.
    """

    def __init__(self, forward: Forward, capture: Capture, call: Any = None, settled: int = 0) -> None:
        self._forward = forward
        self._capture = capture
        self._call = forward.model if call is None else call
        self._settled = settled
        self._lasted: WeakKeyDictionary[BatchCache, _Layout] = WeakKeyDictionary()
        self._steps: WeakKeyDictionary[BatchCache, _FixedStep] = WeakKeyDictionary()
        self._ordinary_left = 0
        self._free_hooks: list[Any] = []
        self.captured = self.repeated = 0
        self.reason = _unsuited(forward)
        if self.reason is None and (capture is not uncaptured or call is not None):
            self._free_hooks = free_hooks(forward.model)
            self.reason = listener(forward.model)
            if self.reason is not None:
                logger.warning(
                    "Decode steps are not captured or compiled: %s, which a replay does not run.", self.reason
                )

    def decode(self, token_ids: Sequence[int], offsets: Sequence[Offset], cache: AnyCache) -> Tensor:
        """Append one token to every sequence; see `Forward.decode`."""
        logits, failure, memory = None, None, False
        if any(self._free_hooks):
            self._look_again()
        if self._ordinary_left:
            self._ordinary_left -= 1
        elif self.reason is None and isinstance(cache, BatchCache):
            try:
                logits = self._fixed(token_ids, offsets, cache)
            except Exception as error:
                raise_if_lost(error)
                failure, memory = f"{type(error).__name__}: {error}", any(map(is_out_of_memory, causes(error)))
        if memory:
            # Not while the error is handled: it refers to what is to be freed.
            self._pause(str(failure))
        if logits is None or not isinstance(cache, BatchCache):
            ordinary = self._forward.decode(token_ids, offsets, cache)
            # If the ordinary forward fails as well, the fixed step is not to blame.
            if failure is not None and not memory:
                self._give_up(failure)
            return ordinary
        self.repeated += 1
        if self._steps[cache].proven:
            cache.add_column()
            return logits
        return self._compared(logits.clone(), token_ids, offsets, cache)

    def _compared(
        self, found: Tensor, token_ids: Sequence[int], offsets: Sequence[Offset], cache: BatchCache
    ) -> Tensor:
        """The logits of an ordinary step in the place of the fixed one; the end of fixed steps if they differ."""
        logits = self._forward.decode(token_ids, offsets, cache)
        if all(close(mine, its) for mine, its in zip(found, logits, strict=True)):
            self._steps[cache].compared += 1
        else:
            self._give_up("their logits are not those of an ordinary step")
        return logits

    def _fixed(self, token_ids: Sequence[int], offsets: Sequence[Offset], cache: BatchCache) -> Tensor | None:
        """Logits [rows, vocab], the new column written but not yet counted; None before the buffers have settled."""
        cache.reserve(1)
        layout = self._lasted.get(cache)
        if layout is None or not layout.holds(cache):
            self._steps.pop(cache, None)
            layout = self._lasted[cache] = _Layout(cache)
        layout.steps += 1
        if layout.steps <= self._settled:
            return None
        step = self._steps.get(cache)
        if step is None or step.dims != len(offsets[0]):
            step = _FixedStep(self._forward, self._call, cache, len(offsets[0]))
            step.load(token_ids, offsets, cache)
            step.repeat = self._capture(step.run)
            self._steps[cache] = step
            self.captured += 1
        step.load(token_ids, offsets, cache)
        return step.repeat()[: len(token_ids)]

    def _look_again(self) -> None:
        """After hooks were registered: transformers' own, or such as a replay would not call."""
        self._free_hooks = free_hooks(self._forward.model)
        found = listener(self._forward.model)
        if found is not None:
            self._give_up(found)

    def _give_up(self, reason: str) -> None:
        logger.warning("Decode steps are not captured or compiled; steps of a fixed shape fail: %s", reason)
        self.reason = reason
        self._free_hooks = []
        self._forget()

    def _pause(self, error: str) -> None:
        """After memory ran out: free what captured steps hold, and decode in ordinary steps for a while."""
        logger.warning("No captured decode steps for the next %d steps; memory ran out: %s", _ORDINARY_STEPS, error)
        self._ordinary_left = _ORDINARY_STEPS
        self._forget()
        free_memory()

    def _forget(self) -> None:
        self._steps.clear()
        self._lasted.clear()


class _Layout:
    """Which buffers a cache had, without keeping them, and for how many steps."""

    def __init__(self, cache: BatchCache) -> None:
        self.steps = 0
        self._places = _places(cache)

    def holds(self, cache: BatchCache) -> bool:
        return self._places == _places(cache)


def _places(cache: BatchCache) -> list[tuple[int, torch.Size]]:
    return [(buffer.data_ptr(), buffer.shape) for layer in cache.held for buffer in layer.buffers]  # type: ignore[attr-defined]


class _FixedStep:
    """One decode step over the buffers of a cache.

    Attributes:
        dims: position dimensions of its sequences.
        repeat: runs it.
        compared: how often it had the logits of an ordinary step.
    """

    def __init__(self, forward: Forward, call: Any, cache: BatchCache, dims: int) -> None:
        layers: list[KeyValueLayer] = [layer for layer in cache.layers if isinstance(layer, KeyValueLayer)]
        room, _, columns, _ = layers[0].buffers[0].shape
        device = forward.device
        self.dims = dims
        self.repeat: Run = self.run
        self.compared = 0
        self._call = call
        self._ids = torch.zeros(room, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(dims, room, 1, dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._mask = torch.zeros(room, 1, 1, columns, dtype=torch.bool, device=device)
        self._columns = torch.arange(columns, device=device)
        view = DynamicCache(config=cache.config)
        view.layers = [_Column(layer.buffers, self._column) for layer in layers]
        self._arguments = {
            "input_ids": self._ids,
            "attention_mask": self._mask,
            "position_ids": self._positions[0] if dims == 1 else self._positions,
            forward.cache_name: view,
            "use_cache": True,
            "return_dict": True,
        }

    @property
    def proven(self) -> bool:
        return self.compared >= _CHECKED

    def load(self, token_ids: Sequence[int], offsets: Sequence[Offset], cache: BatchCache) -> None:
        """Copy in what is new. Rows without a sequence see the new column alone, so that they stay finite; their
        position is 0, as some rotary embeddings follow the largest of a forward."""
        rows, end = len(token_ids), next(layer.end for layer in cache.layers if isinstance(layer, KeyValueLayer))
        lengths = torch.zeros(len(self._ids), dtype=torch.long)
        lengths[:rows] = torch.tensor(cache.lengths)
        positions = torch.zeros(self.dims, len(self._ids), dtype=torch.long)
        positions[:, :rows] = lengths[:rows] + torch.tensor(offsets).T
        self._ids[:rows, 0].copy_(torch.tensor(token_ids), non_blocking=True)
        self._positions[:, :, 0].copy_(positions, non_blocking=True)
        self._column.fill_(end)
        first = (end - lengths).to(self._mask.device, non_blocking=True)[:, None]
        self._mask[:, 0, 0].copy_((self._columns >= first) & (self._columns <= end))

    def run(self) -> Tensor:
        """Logits [room, vocab]."""
        logits: Tensor = self._call(**self._arguments).logits[:, -1]
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


def cuda_graph(run: Run) -> Run:
    """Capture a step; https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs."""
    aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads, which encode images or serve another model, may allocate meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def uncaptured(run: Run) -> Run:
    """A step as it is: torch.compile has its own ways to repeat."""
    return run


def fixed_decode(forward: Forward, options: EngineOptions) -> FixedDecode | None:
    """Fixed steps, compiled where asked for, as graphs on a GPU; None where there are none."""
    mode, reason = options.torch_compile, _unsuited(forward)
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
    return FixedDecode(forward, cuda_graph, settled=4) if graphs else None


def _unsuited(forward: Forward) -> str | None:
    """Why a model cannot have fixed steps."""
    config = forward.model.config.get_text_config(decoder=True)
    if not keeps_all_columns(new_cache(forward.model)):
        return "its layers do not all have full attention"
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return "its attention is not sdpa"
    if forward.rotary.depends:
        return "its rotary frequencies depend on the length of each sequence"
    return None if forward.takes_positions else "its forward takes no positions"
