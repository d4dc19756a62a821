"""Loading models and letting them go, in threads that nobody waits for longer than a limit."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from deployments.adapters.refused import AdapterRefused
from deployments.config.api import ApiOptions
from deployments.config.model import ModelEntry
from deployments.core.errors import RAISED_BY_HOOKS, LoadTimeout, ModelLoadFailed, OutOfMemory, TroupeError, last_line
from deployments.engine.base.failures import free_memory, is_out_of_memory
from deployments.engine.base.hook_watch import position
from deployments.engine.library.transformers_internals import make_models_in_turn
from deployments.engine.model.random_state import RANDOM_STATE
from deployments.host.adapted.merged import merged_info
from deployments.host.fingerprint import ModelFingerprint, model_fingerprint
from deployments.host.inside.captures import CaptureStore
from deployments.host.loaded_model import LoadedModel
from deployments.host.memory.host_copies import HostCopies
from deployments.host.template_processes import RenderLimits, TemplateProcesses
from deployments.host.worker import Worker
from deployments.media.parts import MediaLimits
from deployments.registry.version import Version
from model_loaders.contract import ModelInfo
from model_loaders.local_folder import found
from model_loaders.resolve import load_model_info
from model_loaders.weights.mapped_weights import read_mapped_weights
from model_loaders.weights.progress import counted_weights

logger = logging.getLogger("troupe.host")

LEAVE_LIMIT_S = 90.0
_FOLDER = "the working directory"


def default_device() -> str:
    """Where loaders put their models if nothing else is configured: the first GPU this process sees, else the CPU."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


class Loading:
    """Calls loaders and closes what they gave.

    Args:
        device: where loaders put their models, such as "cuda:0".
        api: limits on what the models' requests may bring.
        given: models that need no loader, by id.
        captures: of the models' requests.
        host_memory_gib: for models that lose their place; see `HostCopies`.

    Attributes:
        copies: of models that lost their place.
    """

    def __init__(
        self,
        device: str,
        *,
        api: ApiOptions | None = None,
        given: Mapping[str, ModelInfo] | None = None,
        captures: CaptureStore | None = None,
        host_memory_gib: float = 0.0,
    ) -> None:
        make_models_in_turn()
        self._captures = captures
        self.copies = HostCopies(host_memory_gib)
        self.device = device
        api = api or ApiOptions()
        self._templates = TemplateProcesses(
            RenderLimits(
                seconds=api.chat_template_timeout_s, memory=api.chat_template_max_bytes, text=api.max_body_bytes
            )
        )
        self._brings_templates = api.allow_request_chat_template
        self._media = MediaLimits(
            parts=api.media_max_parts,
            pixels=api.media_max_pixels,
            seconds=api.max_audio_seconds,
            samples=api.media_max_samples,
        )
        self._given = dict(given or {})
        self._hung: dict[str, tuple[threading.Thread, float]] = {}

    def warm(self) -> None:
        """Start a process for chat templates of requests, where they are allowed."""
        if self._brings_templates:
            self._templates.warm()

    def close(self) -> None:
        """End the processes for chat templates. Blocks."""
        self._templates.close()

    async def load(self, entry: ModelEntry, version: Version | None = None) -> LoadedModel:
        """A model with its engine. One that comes after its time is closed at once.

        Args:
            version: of the files that it is loaded from.

        Raises:
            LoadTimeout: the loader has not returned in time, or still hangs from the last time.
            OutOfMemory: the model does not fit on the device.
            TroupeError: the loader or the model does not work.
        """
        try:
            return await self._load_in_thread(entry, version or Version(model=entry.id))
        except BaseException:
            free_memory()
            raise

    async def unload(self, key: str, model: LoadedModel, *, keep: bool = False) -> None:
        """Close a model and free its memory; one that does not close in time is given up.

        Args:
            keep: its weights may stay in host memory.
        """
        worker = Worker(f"close-{key}")
        keep = keep and model.entry.id not in self._given
        close = partial(self.copies.close_model, key, model) if keep else model.close
        del model
        try:
            await worker.run(close, LEAVE_LIMIT_S)
        except TimeoutError as error:
            logger.error("%s has not closed for %.0f s (at %s); its memory may be lost", key, LEAVE_LIMIT_S, error)
        finally:
            worker.stop()
            del close
            free_memory()

    async def _load_in_thread(self, entry: ModelEntry, version: Version) -> LoadedModel:
        thread, began = self._hung.get(version.key, (None, 0.0))
        if thread is not None and thread.is_alive():
            raise _timeout(entry, time.monotonic() - began, position(thread))
        worker = Worker(f"load-{entry.id}")
        thread, began = worker.thread, time.monotonic()
        abandoned = threading.Event()

        def load() -> LoadedModel:
            model = self._load_now(entry, version)
            if abandoned.is_set():
                logger.warning("%s came too late, after %.0f s; it is closed", entry.id, time.monotonic() - began)
                model.close()
            return model

        try:
            return await worker.run(load, entry.load_timeout_s)
        except TimeoutError as error:
            self._hung[version.key] = (thread, began)
            raise _timeout(entry, entry.load_timeout_s, str(error)) from None
        finally:
            abandoned.set()
            worker.stop()

    def _load_now(self, entry: ModelEntry, version: Version) -> LoadedModel:
        started = time.monotonic()
        try:
            model = self._restored(entry, version) or self._loaded(entry, version)
        except RAISED_BY_HOOKS as error:
            if _caused_by_memory(error):
                raise OutOfMemory(f"Model {entry.id!r} does not fit on {self.device}: {last_line(error)}") from error
            if isinstance(error, ModelLoadFailed) and repr(entry.id) not in error.message:
                error.message = f"Model {entry.id!r}: {error.message}"
            if isinstance(error, TroupeError):
                raise
            logger.exception("model %s has no engine", entry.id)
            raise ModelLoadFailed(f"Model {entry.id!r} of loader {entry.loader}: {last_line(error)}") from error
        logger.info("model %s is ready after %.1f s", entry.id, time.monotonic() - started)
        return model

    def _loaded(self, entry: ModelEntry, version: Version) -> LoadedModel:
        # One that hangs beyond its time keeps no other from loading.
        turn_s = min(entry.hook_timeout_s, entry.load_timeout_s)
        with RANDOM_STATE.lasting(turn_s), counted_weights(entry.id), _watched_settings(entry.id):
            info = self._given.get(entry.id) or self._called(entry)
        info.model_name = info.model_name or entry.id
        info.served_as = entry.id
        read_mapped_weights(info.model)
        return self._model(entry, info, model_fingerprint(entry, version, info))

    def _called(self, entry: ModelEntry) -> ModelInfo:
        """What the loader of a model gives; with the adapter that is to be merged into it."""
        if entry.adapter is None:
            return load_model_info(entry.loader, entry.kwargs, self.device)
        try:
            if not entry.loader:
                raise AdapterRefused("its base was given as a model in memory; nothing is merged into that.")
            return merged_info(load_model_info(entry.loader, entry.kwargs, self.device), found(entry.adapter))
        except AdapterRefused as refused:
            raise refused.named(entry.id) from refused.__cause__

    def _restored(self, entry: ModelEntry, version: Version) -> LoadedModel | None:
        """A model that was kept in host memory; None if there is none, or it gives other bits than before."""
        copy = self.copies.restore(version.key)
        if copy is None:
            return None
        try:
            model = self._model(entry, copy.info, copy.named)
        except BaseException:
            copy.end()
            raise
        if copy.is_like(model):
            return model
        logger.error("%s gives other logits than before it was kept in host memory; it is loaded again", entry.id)
        model.close()
        return None

    def _model(self, entry: ModelEntry, info: ModelInfo, named: ModelFingerprint) -> LoadedModel:
        return LoadedModel(
            entry,
            info,
            media=self._media,
            templates=self._templates,
            named=named,
            captures=self._captures,
            known=self.copies.proofs_of_kind(entry, info),
        )


@contextmanager
def _watched_settings(model: str) -> Iterator[None]:
    """Name what a loader changes for every model of the process, and put the working directory back."""
    before = _process_settings()
    try:
        yield
    finally:
        for name, value in _process_settings().items() - before.items():
            text = "The loader of model %s has changed %s to %s, which belongs to every model of this process."
            logger.warning(text, model, name, value)
        os.chdir(before[_FOLDER])  # Later loaders and files are named from here.


def _process_settings() -> dict[str, str]:
    """What a loader can change for other models, by its name."""
    return {"torch's default dtype": str(torch.get_default_dtype()), _FOLDER: os.getcwd()}


def _timeout(entry: ModelEntry, seconds: float, place: str) -> LoadTimeout:
    return LoadTimeout(
        f"Loader {entry.loader} of model {entry.id!r} has not returned for {seconds:.3g} s (at {place})."
    )


def _caused_by_memory(error: BaseException | None) -> bool:
    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__cause__
    return False
