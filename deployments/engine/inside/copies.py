"""Captured states on their way to the memory of the host.

On a GPU all states of a forward go in one copy per dtype, beside the computation: nothing waits for it but the thread
that writes them to a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Copied:
    """A tensor that is, or soon will be, in the memory of the host."""

    __slots__ = ("_done", "_tensor")

    def __init__(self, tensor: Tensor, done: Any = None) -> None:
        self._tensor = tensor
        self._done = done

    def tensor(self) -> Tensor:
        """The tensor, once it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor


class Copies:
    """Copies the states of one model's forwards."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def of(self, tensors: Sequence[Tensor]) -> list[Copied]:
        """Copies of tensors that nothing else writes to."""
        if not tensors or tensors[0].device.type != "cuda":
            return [Copied(tensor.cpu()) for tensor in tensors]
        found: dict[int, Copied] = {}
        for dtype in {tensor.dtype for tensor in tensors}:
            places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
            copied = self._beside([tensors[place] for place in places])
            found.update(zip(places, copied, strict=True))
        return [found[place] for place in range(len(tensors))]

    def _beside(self, tensors: Sequence[Tensor]) -> list[Copied]:
        """Copies of tensors of one dtype on a stream of their own."""
        device = tensors[0].device
        stream: Any = self._streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        stream.wait_stream(torch.cuda.current_stream(device))
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            host.copy_(flat, non_blocking=True)
            flat.record_stream(stream)
            done.record(stream)
        parts = torch.split(host, [tensor.numel() for tensor in tensors])
        return [Copied(part.view(tensor.shape), done) for part, tensor in zip(parts, tensors, strict=True)]
