"""Models that lost their place, kept in the memory of the host so that their next visit costs a copy and no load.

On a GPU the weights move to pinned host memory. On a CPU they are there already, and are not freed. Engines, caches and
prefixes are gone; see `Proofs` for what the next engine need not measure again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deployments.config.model import ModelEntry
from deployments.core.cgroup import free_bytes, total_bytes
from deployments.core.errors import TroupeError
from deployments.engine.base.failures import free_memory
from deployments.engine.base.protocol import Engine
from deployments.engine.batching.engine import BatchingEngine
from deployments.host.memory.kind import model_kind
from deployments.host.memory.storages import Storages, Unmovable
from model_loaders.contract import ModelInfo

logger = logging.getLogger("troupe.host")

_GIB = 1 << 30
_SPARE_SHARE = 0.2
_KINDS = 64


class Model(Protocol):
    """What is read of a loaded model."""

    entry: ModelEntry
    info: ModelInfo
    named: Any
    engine: Engine

    def check(self) -> None:
        """Raise TroupeError if something has failed that may have changed it."""

    def stop(self) -> bool:
        """End its threads; False if one computes on."""


@dataclass(slots=True, kw_only=True)
class HostCopy:
    """A model without a place.

    Attributes:
        named: its fingerprint.
        sample: logits that it gave, see `Capabilities.sample`; None if it is not batched.
        storages: of its tensors; None until it is kept.
    """

    model: str
    info: ModelInfo
    named: Any
    sample: Tensor | None
    storages: Storages | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.storages is None else self.storages.nbytes

    def is_like(self, model: Model) -> bool:
        """Whether a model that was made of this copy gives the same bits."""
        now = _sample(model)
        if self.sample is None or now is None:
            return True
        return torch.equal(self.sample.nan_to_num(), now.nan_to_num())

    def end(self) -> None:
        """Tell the loader that the model is freed."""
        if self.info.close is not None:
            try:
                self.info.close()
            except Exception:
                logger.exception("the close hook of %s failed", self.model)


class HostCopies:
    """The models of one process that lost their place, by version; the least recently used ones go first.

    Any thread may call it. Moving a model blocks.

    Args:
        gib: what they may have together.

    Attributes:
        restored: how often a model came back.
    """

    def __init__(self, gib: float = 0.0) -> None:
        self._gib = gib
        self._wanted: Counter[str] = Counter()
        self._copies: OrderedDict[str, HostCopy] = OrderedDict()
        self._kinds: OrderedDict[Hashable, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._keeping = threading.Lock()
        self._unwanted: set[str] = set()
        self.restored = 0

    def proofs_of_kind(self, entry: ModelEntry, info: ModelInfo) -> dict[str, Any]:
        """What was proved of models of the same kind, to be added to; see `Proofs`."""
        kind = model_kind(entry, info)
        if kind is None:
            return {}
        with self._lock:
            known = self._kinds.setdefault(kind, {})
            self._kinds.move_to_end(kind)
            while len(self._kinds) > _KINDS:
                self._kinds.popitem(last=False)
        return known

    def close_model(self, key: str, model: Model) -> None:
        """Close a model, and keep it if that is possible.

        Args:
            key: its version.
        """
        copy = HostCopy(model=model.entry.id, info=model.info, named=model.named, sample=_sample(model))
        keeps = self._gib > 0 and key not in self._unwanted and _can_be_kept(model)
        keeps = model.stop() and keeps
        del model
        if not (keeps and self._keep(key, copy)):
            copy.end()

    def restore(self, key: str) -> HostCopy | None:
        """A model of this version that is on its device again; None if none is kept.

        Raises:
            torch.OutOfMemoryError: the device has no memory for it; it is kept.
        """
        with self._lock:
            copy = self._copies.pop(key, None)
        if copy is None or copy.storages is None:
            return None
        begun = time.monotonic()
        try:
            if copy.storages.device.type != "cpu":
                copy.storages.restore()
        except BaseException:
            with self._lock:
                self._copies[key] = copy
            raise
        self.restored += 1
        seconds = time.monotonic() - begun
        logger.info("%s comes from host memory: %.2f GiB in %.2f s", copy.model, copy.nbytes / _GIB, seconds)
        return copy

    def drop(self, key: str) -> bool:
        """Free a version; False if it is not kept."""
        with self._lock:
            copy = self._copies.pop(key, None)
        if copy is None:
            return False
        copy.end()
        del copy
        free_memory()
        return True

    @contextlib.contextmanager
    def wanted(self, key: str) -> Iterator[None]:
        """Within the block a version is not freed to make room: requests wait for it."""
        self._wanted[key] += 1
        try:
            yield
        finally:
            self._wanted[key] -= 1
            if not self._wanted[key]:
                del self._wanted[key]

    @contextlib.contextmanager
    def freed(self, key: str) -> Iterator[None]:
        """Within the block a version is not kept; at its end nothing is kept of it."""
        self._unwanted.add(key)
        try:
            yield
        finally:
            self._unwanted.discard(key)
            self.drop(key)

    def close(self) -> None:
        """Free everything, and keep nothing from now on."""
        self._gib = 0.0
        for key in list(self._copies):
            self.drop(key)

    def stats(self) -> dict[str, Any]:
        """What is kept, as JSON values."""
        with self._lock:
            kept = [
                {"id": copy.model, "fingerprint": copy.named.name, "bytes": copy.nbytes}
                for copy in self._copies.values()
            ]
        return {"host_copies": kept, "restored": self.restored}

    def _keep(self, key: str, copy: HostCopy) -> bool:
        begun = time.monotonic()
        try:
            storages = Storages(copy.info.model)
            moves = storages.device.type != "cpu"
            with self._keeping:
                self._make_room(storages.nbytes, storages.nbytes if moves else 0)
                if moves:
                    storages.release()
                copy.storages = storages
                with self._lock:
                    self._copies[key] = copy
        except Unmovable as reason:
            logger.warning("%s is not kept in host memory: %s", copy.model, reason)
            return False
        seconds = time.monotonic() - begun
        logger.info("%s is kept in host memory: %.2f GiB in %.2f s", copy.model, copy.nbytes / _GIB, seconds)
        return True

    def _make_room(self, needed: int, more: int) -> None:
        """Free the least recently used copies until one of `needed` bytes fits, which takes `more` bytes of the host.

        Raises:
            Unmovable: it does not fit alone.
        """
        limit, spare = self._gib * _GIB, total_bytes() * _SPARE_SHARE
        if needed > limit:
            raise Unmovable(f"it has {needed / _GIB:.3g} GiB, host_memory_gib is {self._gib:.3g}")
        while True:
            with self._lock:
                # What is wanted leaves at once where nothing has to be moved.
                held = sum(copy.nbytes for key, copy in self._copies.items() if more or key not in self._wanted)
                oldest = next((key for key in self._copies if key not in self._wanted), None)
            is_short = free_bytes() - more < spare
            if held + needed <= limit and not is_short:
                return
            if oldest is None:
                short = "less than a fifth of the host's memory would be left"
                raise Unmovable(short if is_short else "requests wait for the other models that are kept")
            self.drop(oldest)


def _can_be_kept(model: Model) -> bool:
    """Whether the model is a module that our own engine computes, and nothing has failed that may have changed it."""
    if not isinstance(model.info.model, nn.Module) or model.info.engine is not None:
        return False
    try:
        model.check()
    except TroupeError as error:
        logger.warning("%s is not kept in host memory: %s", model.entry.id, error)
        return False
    return True


def _sample(model: Model) -> Tensor | None:
    return model.engine.capabilities.sample if isinstance(model.engine, BatchingEngine) else None
