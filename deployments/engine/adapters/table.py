"""The adapters of one engine: which modules they change, and the forwards that are computed with them.

While a forward with adapters runs, the modules that they change have forwards of ours; at any other time the model is
as it was. So a forward of the base alone costs nothing, and other threads, which embed or align with the same
modules, are not disturbed: the adapters of a forward are those of its thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deployments.adapters.lora_file import LoraFile
from deployments.adapters.refused import NeedsMerge
from deployments.engine.adapters.adapted_module import AdaptedModule
from deployments.engine.adapters.lora import Fitted, fit_lora
from deployments.engine.adapters.step import AdapterStep, current_step, set_step


@dataclass(frozen=True, slots=True)
class Watched:
    """How a model calls some of its modules.

    Attributes:
        mixing: those whose inputs are sequences, in a forward of several.
        bypassed: those that are not called, though the module that they are a part of is.
    """

    mixing: frozenset[str]
    bypassed: frozenset[str]


Watch = Callable[[Mapping[str, nn.Module]], Watched]
_BASE: AbstractContextManager[None] = contextlib.nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedAdapter:
    """An adapter on the device.

    Attributes:
        modules: names of the modules that it changes.
        nbytes: of its matrices.
        rank: the largest of its modules.
        apart: why no forward computes sequences of other adapters beside its own, in words; empty if forwards do.
    """

    modules: frozenset[str]
    nbytes: int
    rank: int
    apart: str


class AdapterTable:
    """The adapters of one engine, by their versions. Changed between forwards of the engine's thread alone.

    Args:
        model: the base; its forwards, packed or not, are those that compute the base's part.
        row_by_row: a sequence's bits must not depend on others.
        watch: tells how modules are called; None if every forward has one adapter.
    """

    def __init__(self, model: nn.Module, *, row_by_row: bool = False, watch: Watch | None = None) -> None:
        self._model = model
        self._row_by_row = row_by_row
        self._watch = watch
        self._adapters: dict[str, PlacedAdapter] = {}
        self._modules: dict[str, AdaptedModule] = {}
        self._mixing: dict[str, bool] = {}
        self._bypassed: set[str] = set()
        self._idle = threading.Condition()
        self._under_way = 0
        self._installed: list[tuple[dict[str, Any], Any]] = []

    def __contains__(self, key: str) -> bool:
        return key in self._adapters

    def fit(self, file: LoraFile, dtype: torch.dtype = torch.float32) -> Fitted:
        """The matrices of an adapter for the modules of the base, on its device. Any thread may call it.

        Args:
            dtype: of the matrices, in which the delta is computed.

        Raises:
            AdapterRefused: it does not fit the base.
        """
        # Adapters are used in and out of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return fit_lora(self._model, file, dtype)

    def add(self, key: str, fitted: Fitted) -> PlacedAdapter:
        """Let forwards use an adapter.

        Args:
            key: its version.
            fitted: see `fit`.

        Raises:
            NeedsMerge: a module that it changes is never called.
        """
        with self._idle:
            if self._watch is not None:  # It gives modules forwards of its own.
                self._idle.wait_for(lambda: not self._under_way)
            adapter = PlacedAdapter(
                modules=fitted.modules,
                nbytes=fitted.nbytes,
                rank=max(lora.rank for lora in fitted.loras.values()),
                apart=self._apart(fitted.modules),
            )
            for name, lora in fitted.loras.items():
                self._adapted(name).loras[key] = lora
            for name, module in fitted.saved.items():
                self._adapted(name).saved[key] = module
            for name, rows in fitted.tokens.items():
                self._adapted(name).tokens[key] = rows
            self._adapters[key] = adapter
        return adapter

    def remove(self, key: str) -> None:
        """Drop an adapter that no sequence has."""
        adapter = self._adapters.pop(key, None)
        for name in () if adapter is None else adapter.modules:
            self._modules[name].forget(key)

    def group(self, key: str) -> str:
        """What sequences that one forward computes have in common: an adapter that does not mix goes by itself."""
        return key if key and self._adapters[key].apart else ""

    def applied(self, keys: Sequence[str]) -> AbstractContextManager[None]:
        """The context of a forward of this thread.

        Args:
            keys: the adapter of each of its sequences; empty for the base.
        """
        return self._applied(AdapterStep(keys)) if any(keys) else _BASE

    @contextlib.contextmanager
    def _applied(self, step: AdapterStep) -> Iterator[None]:
        before = current_step()
        self._install()
        set_step(step)
        try:
            yield
        finally:
            set_step(before)
            self._uninstall()

    def _install(self) -> None:
        with self._idle:
            self._under_way += 1
            if self._under_way > 1:
                return
            for adapted in self._modules.values():
                own = vars(adapted.module)
                self._installed.append((own, own.get("forward")))
                own["forward"] = adapted.forward

    def _uninstall(self) -> None:
        with self._idle:
            self._under_way -= 1
            if self._under_way:
                return
            for own, forward in self._installed:
                if forward is None:
                    del own["forward"]
                else:
                    own["forward"] = forward
            self._installed.clear()
            self._idle.notify_all()

    def _adapted(self, name: str) -> AdaptedModule:
        if name not in self._modules:
            self._modules[name] = AdaptedModule(self._model.get_submodule(name), row_by_row=self._row_by_row)
        return self._modules[name]

    def _apart(self, names: Collection[str]) -> str:
        if self._watch is None:
            return "in this engine every forward has one adapter"
        new = {name: self._model.get_submodule(name) for name in names if name not in self._mixing}
        if new:
            watched = self._watch(new)
            self._mixing.update({name: name in watched.mixing for name in new})
            self._bypassed |= watched.bypassed
        for name in sorted(self._bypassed.intersection(names)):
            raise NeedsMerge(f"its base reads the weight of {name} without calling the module")
        others = sorted(name for name in names if not self._mixing[name])
        return f"{', '.join(others[:3])}{' …' if len(others) > 3 else ''} do not see the batch" if others else ""
