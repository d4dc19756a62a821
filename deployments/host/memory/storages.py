"""The memory of a model's tensors, moved from a device to the host and back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_CHUNK = 64 << 20


class Unmovable(Exception):
    """A model cannot be moved. The message is the reason, as a clause."""


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor, and where its numbers are in its storage."""

    tensor: Tensor
    storage: int
    offset: Any
    shape: torch.Size
    stride: tuple[int, ...]


class Storages:
    """The storages of a model's parameters, buffers and tensors in attributes, each once.

    Tensors keep their identity, so that what is tied stays tied.

    Args:
        model: not being run by anyone.
        chunk: bytes of one piece of host memory; a power of two, because torch rounds up what it pins.

    Attributes:
        nbytes: of the storages.
        device: that they belong on.

    Raises:
        Unmovable: a tensor has no storage that could be copied, or the tensors are on several devices.
    """

    def __init__(self, model: nn.Module, *, chunk: int = _CHUNK) -> None:
        self._chunk = chunk
        self._views: list[_View] = []
        self._held: list[torch.UntypedStorage] = []
        self._host: list[Tensor] = []
        places: dict[int, int] = {}
        for tensor in _tensors(model):
            storage = _storage(tensor)
            if storage._cdata not in places:
                places[storage._cdata] = len(self._held)
                self._held.append(storage)
            place = places[storage._cdata]
            self._views.append(_View(tensor, place, tensor.storage_offset(), tensor.shape, tensor.stride()))
        self._sizes = [storage.nbytes() for storage in self._held]
        self.nbytes = sum(self._sizes)
        devices = {storage.device for storage in self._held} or {torch.device("cpu")}
        if len(devices) > 1:
            raise Unmovable(f"its tensors are on {len(devices)} devices")
        (self.device,) = devices

    def release(self) -> None:
        """Copy everything to the host, and free it on the device.

        Raises:
            Unmovable: the host has no memory for it, or something else holds the memory of a tensor. The model is of no
                use any more in the second case.
        """
        pinned = self.device.type == "cuda"
        try:
            count = -(-self.nbytes // self._chunk)
            self._host = [torch.empty(self._chunk, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]
        except RuntimeError as error:
            self._host = []
            raise Unmovable(f"the host has no memory for it: {error}") from error
        self._copy_to_host()
        weak: Any = StorageWeakRef
        held = [weak(storage) for storage in self._held]
        self._held = []
        with torch.inference_mode(False), torch.no_grad():
            for view in self._views:
                view.tensor.data = view.tensor.data.new_empty(0)
        if not all(storage.expired() for storage in held):
            raise Unmovable("something beside its parameters and buffers holds their memory")

    def restore(self) -> None:
        """Bring everything back to the device.

        Raises:
            torch.OutOfMemoryError: the device has no memory for it. Everything is as before.
        """
        with torch.inference_mode(False), torch.no_grad():
            back = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in self._sizes]
            for own, host in self._pieces(back):
                own.copy_(host, non_blocking=True)
            self._synchronize()
            for view in self._views:
                whole = back[view.storage].untyped_storage()
                empty = torch.empty(0, dtype=view.tensor.dtype, device=self.device)
                view.tensor.data = empty.set_(whole, view.offset, view.shape, view.stride)
        self._host = []

    def _copy_to_host(self) -> None:
        """In a function of its own: what it names of the storages is gone when it ends."""
        for own, host in self._pieces([_bytes(storage) for storage in self._held]):
            host.copy_(own, non_blocking=True)
        self._synchronize()

    def _pieces(self, storages: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the storages' bytes, and the parts of the host's chunks that they belong to."""
        start = 0
        for own in storages:
            done = 0
            while done < own.numel():
                chunk, at = divmod(start + done, self._chunk)
                size = min(own.numel() - done, self._chunk - at)
                yield own[done : done + size], self._host[chunk][at : at + size]
                done += size
            start += own.numel()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor of a module once: also buffers that are not saved, and what is in attributes."""
    seen: set[int] = set()
    for module in model.modules():
        own = [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False), own):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    if type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
        raise Unmovable(f"it has tensors of the type {type(tensor).__name__}")
    return tensor.untyped_storage()


def _bytes(storage: torch.UntypedStorage) -> Any:
    """The bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
