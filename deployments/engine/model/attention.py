"""Attention of a decode step: one query per sequence, over keys that end in the same column.

transformers' `sdpa` attention is replaced by one that does the same, inside `DecodeAttention` only: elsewhere, and for
whatever it does not know, it calls the original. Two things are done differently on the CPU:

- The queries of the heads that share a key head become the queries of that head, with or without a mask, so that keys
  are read once per key head. In bfloat16 a lone query is sent twice: one query takes a slower kernel than two.
- If a batch is mostly padding, or bits must not depend on neighbors, each sequence attends to its own keys by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deployments.engine.library.transformers_internals import SDPA_EXTRAS, AttentionInterface, sdpa_attention_forward

_PADDED_SHARE = 0.4


class DecodeAttention:
    """A context in which this thread's `sdpa` attention is that of a decode step.

    Args:
        per_sequence: every sequence attends to its own keys by itself, always.
        shared: no sequence does, however much of a batch is padding.
    """

    def __init__(self, *, per_sequence: bool = False, shared: bool = False) -> None:
        if _registered["sdpa"] is sdpa_attention_forward:
            AttentionInterface.register("sdpa", _attention)
        self.per_sequence = per_sequence
        self.shared = shared
        self._starts: dict[int, tuple[Tensor, list[int] | None]] = {}

    def __enter__(self) -> DecodeAttention:
        _local.step = self
        return self

    def __exit__(self, *exception: object) -> None:
        _local.step = None
        self._starts.clear()

    def starts(self, mask: Tensor) -> list[int] | None:
        """The first key of each sequence, if it sees all keys from there on; computed once for all layers of a step."""
        known = self._starts.get(id(mask))
        if known is None:
            known = self._starts[id(mask)] = (mask, _starts(mask))
        return known[1]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A call of `sdpa` attention.

    Attributes:
        query: [rows, heads, tokens, dim].
        key: [rows, key heads, columns, dim].
        mask: [rows, 1 or heads, tokens, columns], or None.
        causal: without a mask, a token does not see later ones.
        extras: other arguments change its weights.
    """

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float | None
    causal: bool
    extras: bool


Watcher = Callable[[AttentionCall], None]


@contextmanager
def watched_attention(watcher: Watcher) -> Iterator[None]:
    """A context in which a function sees every call of this thread's `sdpa` attention."""
    _local.watcher = watcher
    try:
        yield
    finally:
        _local.watcher = None


def attend_without_plans() -> None:
    """Keep attention off cuDNN, which plans each new shape anew: about 40 ms on an H200, in every step of a growing
    text, where torch prefers it."""
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def planned_attention() -> Iterator[None]:
    """A context in which torch may take cuDNN's attention again: what is captured in it has one shape."""
    torch.backends.cuda.enable_cudnn_sdp(_had_cudnn)
    try:
        yield
    finally:
        attend_without_plans()


def is_decoding() -> bool:
    """Whether this thread is inside a decode step."""
    return getattr(_local, "step", None) is not None


_local = threading.local()
_registered = AttentionInterface()
_had_cudnn: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `sdpa_attention_forward` does.

    Args:
        query: [rows, heads, tokens, dim].
        key, value: [rows, key heads, columns, dim].
        attention_mask: [rows, 1 or heads, tokens, columns], or None.

    Returns:
        [rows, tokens, heads, dim], and no weights.
    """
    compiling = torch.compiler.is_compiling()
    step: DecodeAttention | None = None if compiling else getattr(_local, "step", None)
    if not compiling and (watcher := getattr(_local, "watcher", None)) is not None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        extras = bool(dropout) or any(kwargs.get(name) is not None for name in SDPA_EXTRAS)
        watcher(AttentionCall(module, query, key, attention_mask, scaling, causal, extras))
    if (
        step is None
        or dropout
        or not _is_decode(query, key, kwargs)
        or not (step.per_sequence or query.device.type == "cpu")
    ):
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return output
    rows, heads = query.shape[:2]
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], query.shape[3])
    starts = _starts_per_sequence(step, key, attention_mask)
    if starts is None:
        attended = _grouped(grouped, key, value, _shared(attention_mask, grouped), scaling)
    else:
        each = [
            _grouped(grouped[i : i + 1], key[i : i + 1, :, start:], value[i : i + 1, :, start:], None, scaling)
            for i, start in enumerate(starts)
        ]
        attended = torch.cat(each) if rows > 1 else each[0]
    return attended.reshape(rows, 1, heads, value.shape[3]), None


def _is_decode(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> bool:
    return (
        query.shape[2] == 1
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and not any(kwargs.get(name) is not None for name in SDPA_EXTRAS if kwargs)
    )


def _starts_per_sequence(step: DecodeAttention, key: Tensor, mask: Tensor | None) -> list[int] | None:
    """The first key of each sequence, if the sequences are to attend by themselves."""
    if mask is None:
        return [0] * key.shape[0] if step.per_sequence else None
    starts = None if step.shared else step.starts(mask)
    if starts is None or step.per_sequence:
        return starts
    return starts if mostly_padding(starts, mask.shape[-1]) else None


def mostly_padding(starts: Sequence[int], columns: int) -> bool:
    """Whether sequences attend to their own keys by themselves, because others' would be mostly padding.

    Args:
        starts: the first key of each sequence.
        columns: keys of the longest.
    """
    return sum(starts) > _PADDED_SHARE * len(starts) * columns


def _starts(mask: Tensor) -> list[int] | None:
    if mask.dtype is not torch.bool or mask.shape[1] != 1:
        return None
    visible = mask[:, 0, -1]
    starts = visible.int().argmax(-1)
    whole = visible.sum(-1) + starts == mask.shape[-1]
    return starts.tolist() if bool(whole.all()) else None


def _shared(mask: Tensor | None, grouped: Tensor) -> Tensor | None:
    """The mask for grouped queries."""
    if mask is None or mask.shape[1] == 1:
        return mask
    return mask.reshape(*grouped.shape[:3], mask.shape[-1])


def _grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    if query.shape[2] > 1 or query.dtype is torch.float32:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    twice = query.expand(-1, -1, 2, -1)
    return scaled_dot_product_attention(twice, key, value, attn_mask=mask, scale=scaling)[:, :, :1]
