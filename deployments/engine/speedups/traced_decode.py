"""Decode steps without the model's Python: the operators of one step, traced once and repeated by torch's interpreter.

They are the operators of an ordinary step on tensors of the same shapes, so the bits are the same. What is saved is
Python, about a quarter of a small model's step, and its lock, which other threads of the process have meanwhile.

Shapes may change from step to step, but Python does not run again. So a model whose Python reads numbers of its tensors
is not traced (`_Reads`), such as one that asks which experts are chosen. The first steps of each number of sequences
and of each magnitude of lengths are compared with ordinary ones, bit by bit.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deployments.config.engine import EngineOptions
from deployments.engine.cache.cache import BatchCache, visible_columns
from deployments.engine.library.transformers_internals import DynamicCache, DynamicLayer
from deployments.engine.model.attention import DecodeAttention, mostly_padding
from deployments.engine.model.forward import Forward, Offset, next_positions
from deployments.engine.speedups.packed_linear import traceable
from deployments.engine.speedups.replayed_decode import ReplayedDecode

logger = logging.getLogger(__name__)

_SETTLED = 256
"""Ordinary steps before a trace, which takes the time that it saves in about as many."""
_ROWS, _COLUMNS = 2, 9
# Passes of optimization take a second for every new shape, and may change bits. A version of torch may lack the switch.
_with_passes: Any = getattr(torch.jit, "optimized_execution", None)
_LEARNED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_READING = {"tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__"}


class TracedDecode(ReplayedDecode):
    """Decodes like `Forward.decode`, in traced steps where that is possible.

    Args:
        forward: the model's forward passes.
        settled: ordinary steps before one is traced.
    """

    verb = "traced"
    level = logging.INFO

    def __init__(self, forward: Forward, settled: int = _SETTLED) -> None:
        super().__init__(forward, listens=True)
        self._settled = settled
        self._wanted: Counter[_Form] = Counter()
        self._traces: dict[_Form, _Trace] = {}
        self._steps: dict[_Kind, _TracedStep] = {}

    @property
    def traced(self) -> int:
        """How many forms of steps are traced."""
        return len(self._traces)

    def forget(self) -> None:
        self._traces.clear()
        self._steps.clear()
        self._wanted.clear()

    def _step(self, cache: BatchCache, dims: int) -> _TracedStep | None:
        padding = [cache.width - length for length in cache.lengths]
        # Sequences attend by themselves then.
        if mostly_padding(padding, cache.width + 1):
            return None
        form = _Form(any(padding), dims)
        if form not in self._traces:
            self._wanted[form] += 1
            if self._wanted[form] <= self._settled:
                return None
            start = time.perf_counter()
            self._traces[form] = _trace(self._forward, cache, form)
            padded = "with" if form.padded else "without"
            logger.info("Decode steps %s padding are traced (%.1f s).", padded, time.perf_counter() - start)
        kind = _Kind(form, len(padding), cache.width.bit_length())
        if kind not in self._steps:
            self._steps[kind] = _TracedStep(self._forward, self._traces[form], form)
        return self._steps[kind]

    def _agree(self, found: Tensor, ordinary: Tensor) -> bool:
        return torch.allclose(found, ordinary, rtol=0, atol=0, equal_nan=True)


class _Form(NamedTuple):
    """What one trace can do: whether some sequence is padded, and position dimensions."""

    padded: bool
    dims: int


class _Kind(NamedTuple):
    """Steps that are compared together."""

    form: _Form
    rows: int
    magnitude: int


_Trace = Callable[..., Tensor]
"""Of token ids, positions, the mask if the form has one, and four views of each layer, to logits [rows, vocab]."""


class _TracedStep:
    """Steps of one kind; see `ReplayedStep`."""

    def __init__(self, forward: Forward, trace: _Trace, form: _Form) -> None:
        self.compared = 0
        self._device = forward.device
        self._trace = trace
        self._form = form

    def decode(self, token_ids: Sequence[int], offsets: Sequence[Offset], cache: BatchCache) -> Tensor:
        lengths = torch.tensor(cache.lengths)
        given = [torch.tensor(token_ids)[:, None], next_positions(lengths, offsets)]
        if self._form.padded:
            given.append(visible_columns(lengths + 1, cache.width + 1)[:, None, None])
        views = [view for layer in cache.layers for view in layer.next_column()]
        with _with_passes(False):
            return self._trace(*(each.to(self._device, non_blocking=True) for each in given), *views)


class _Layer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values as a traced step has them: the new column, and all up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.views: Sequence[Tensor] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new_key, new_value, keys, values = self.views
        new_key.copy_(key_states)
        new_value.copy_(value_states)
        return keys, values

    def get_seq_length(self) -> int:
        return _COLUMNS - 1


class _Step(nn.Module):
    """An ordinary decode step as a function of tensors."""

    def __init__(self, forward: Forward, config: Any, form: _Form) -> None:
        super().__init__()
        self.model = forward.model
        self._form = form
        self._cache_name = forward.cache_name
        self._cache = DynamicCache(config=config)
        self._cache.layers = [_Layer() for _ in self._cache.layers]
        self._attention = DecodeAttention(shared=True)

    def forward(self, token_ids: Tensor, positions: Tensor, *views: Tensor) -> Tensor:
        arguments: dict[str, Any] = {}
        if self._form.padded:
            arguments["attention_mask"], *views = views  # type: ignore[assignment]
        for index, layer in enumerate(self._cache.layers):
            layer.views = views[4 * index : 4 * index + 4]
        arguments |= {"input_ids": token_ids, "position_ids": positions, self._cache_name: self._cache}
        with self._attention:
            logits: Tensor = self.model(**arguments, use_cache=True, return_dict=True).logits[:, -1]
        return logits


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators whose results, or whose shapes, Python learns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _LEARNED & set(func.tags) and not (func is torch.ops.aten.index.Tensor and _has_fixed_shape(args[1])):
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


def _has_fixed_shape(indices: Sequence[Tensor | None]) -> bool:
    """Whether no index is a mask."""
    return not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Conversions(TorchFunctionMode):
    """Notes tensors that become numbers of Python, which no operator shows."""

    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READING:
            self._found.add(name)
        return func(*args, **(kwargs or {}))


def _trace(forward: Forward, cache: BatchCache, form: _Form) -> _Trace:
    """A trace of a step, made with zeros.

    Raises:
        ValueError: the model reads numbers of its tensors.
    """
    step = _Step(forward, cache.config, form).eval()
    inputs = _zeros(forward, cache, form)
    with _Reads() as reads, _Conversions(reads.found):
        step(*inputs)
    if reads.found:
        raise ValueError(f"the model's Python reads numbers of its tensors ({', '.join(sorted(reads.found))})")
    # Comparing shapes warns, and so does tracing, in favor of compilers that would change bits.
    with warnings.catch_warnings(action="ignore"), traceable(forward.model):
        trace: _Trace = torch.jit.trace(step, inputs, check_trace=False)  # type: ignore[no-untyped-call]
    return trace


def _zeros(forward: Forward, cache: BatchCache, form: _Form) -> tuple[Tensor, ...]:
    """Inputs of a step of two sequences."""
    views = []
    for layer in cache.layers:
        held = [old.new_zeros(_ROWS, old.shape[1], _COLUMNS, old.shape[3]) for old in layer.buffers]
        views += [*(each[:, :, -1:] for each in held), *held]
    tokens = torch.zeros(_ROWS, 1, dtype=torch.long, device=forward.device)
    mask = [torch.ones(_ROWS, 1, 1, _COLUMNS, dtype=torch.bool, device=forward.device)] if form.padded else []
    return tokens, tokens.expand(form.dims, _ROWS, 1) if form.dims > 1 else tokens, *mask, *views


def traced_decode(forward: Forward, options: EngineOptions) -> TracedDecode | None:
    """Traced steps, on a CPU or where they are asked for; None where there are none."""
    wanted = forward.device.type == "cpu" if options.trace_steps is None else options.trace_steps
    if not wanted or _with_passes is None or options.deterministic:
        return None
    decode = TracedDecode(forward)
    return decode if decode.reason is None else None
