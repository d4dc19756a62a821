"""The models of one process: loaded on demand, leased to requests, each with its engine.

`ModelHost` is what a replica serves to the ingress, and what `deployments.local` serves without Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import asdict, replace
from typing import Any

import torch

from deployments.config.app import AppArgs, unknown_model
from deployments.core.calls import Call, Prompt, TranscribeCall
from deployments.core.client import Embeddings, EmbedOptions, Rendered, TokenPiece
from deployments.core.errors import BadRequest, ModelError, TroupeError, Unavailable, last_line
from deployments.core.events import Event, Failed
from deployments.core.model_card import ModelCard
from deployments.core.token_ids import vocab_size
from deployments.host.generation import Generation
from deployments.host.leases import Leases
from deployments.host.loaded_model import CLOSE_LIMIT_S, LoadedModel
from deployments.host.loading import Loading
from deployments.host.profiling import Trace
from deployments.host.tested_versions import warn_of_untested_transformers
from model_loaders.contract import ModelInfo

logger = logging.getLogger("troupe.host")


def default_device() -> str:
    """Where loaders put their models unless told otherwise: the first GPU this process sees, else the CPU."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


class ModelHost:
    """A `ModelClient` over models loaded in this process.

    Args:
        args: the application's configuration.
        device: where loaders put their models, such as "cuda:0".
        on_gone: called with the id of a model that was unloaded or could not be loaded.
        given: models that are loaded already, by id.
    """

    def __init__(
        self,
        args: AppArgs,
        device: str | None = None,
        *,
        on_gone: Callable[[str], None] = lambda key: None,
        given: Mapping[str, ModelInfo] | None = None,
    ) -> None:
        warn_of_untested_transformers()
        self.args = args
        self._on_gone = on_gone
        self.device = device or default_device()
        self._loading = Loading(self.device, api=args.api, given=given)
        self._entries = args.by_name()
        self._by_id = {entry.id: entry for entry in args.models}
        self._draining = False
        self._limits: dict[str, int] = {}
        self._traces = {
            entry.id: Trace(entry.profile_dir, entry.id) for entry in args.models if entry.profile_dir is not None
        }
        self.leases: Leases[LoadedModel] = Leases(
            self._load,
            self._unload,
            capacity=args.max_models_per_replica,
            patience=args.swap_patience_s,
            retry_after=lambda key: self._by_id[key].load_retry_s,
            idle_limit=lambda key: self._by_id[key].idle_unload_s,
        )
        for entry in args.models:
            if entry.pinned:
                self.leases.pin(entry.id)

    def models(self) -> Sequence[ModelCard]:
        """Every configured model; its limits once it was loaded."""
        return [replace(entry.card, max_model_len=self._limits.get(entry.id)) for entry in self.args.models]

    def resolve(self, name: str) -> ModelCard:
        """The model with this id or alias.

        Raises:
            ModelNotFound: there is none.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise unknown_model(name, self.args)
        return replace(entry.card, max_model_len=self._limits.get(entry.id))

    async def preload(self) -> None:
        """Load what is to be there from the start; a failure is logged, and answered to requests that ask for it."""
        self._loading.warm()
        for entry in self.args.models:
            if entry.pinned or entry.preload:
                try:
                    await self.load(entry.id)
                except TroupeError as error:
                    logger.error("preloading %s: %s", entry.id, error)

    async def load(self, model: str) -> None:
        """Load a model now, as a request for it would."""
        async with self.leases.lease(self.resolve(model).id):
            pass

    async def unload(self, model: str) -> bool:
        """Unload a model once nobody uses it; False if it is not loaded. A later request loads it again."""
        return await self.leases.evict(self.resolve(model).id)

    async def drain(self, on: bool = True) -> None:
        """Refuse new calls and end those that run; or take calls again."""
        self._draining = on

    async def status(self) -> list[dict[str, Any]]:
        """What this process holds and does, as JSON values."""
        return [self.snapshot()]

    def snapshot(self) -> dict[str, Any]:
        """The same, at this moment."""
        stats = self.leases.stats()
        models = [
            {"id": key, "in_use": stats.in_use.get(key, 0), **asdict(model.engine.stats())}
            for key, model in self.leases.values().items()
        ]
        return {
            "pid": os.getpid(),
            "device": self.device,
            "draining": self._draining,
            "models": models,
            "loading": list(stats.loading),
            "failed": {key: error.message for key, error in stats.failed.items() if key not in stats.loading},
            "waiting": stats.waiting,
            "loads": stats.loads,
            "load_failures": stats.failures,
            "evictions": stats.evictions,
        }

    async def generate(self, call: Call) -> AsyncGenerator[Event, None]:
        """The events of a call; a failure is the last of them. Closing the generator stops the computation."""
        started, interval = time.monotonic(), self.args.stream_interval_ms / 1000
        try:
            if self._draining:
                raise Unavailable("The server is draining: it ends what runs and takes nothing new.", retry_after=5)
            async with self.leases.lease(call.model) as model, self._traced(model):
                if isinstance(call, TranscribeCall):
                    async with aclosing(model.transcribe(call, interval=interval)) as heard:
                        async for event in heard:
                            yield event
                    return
                generation = await Generation.start(model, call, interval=interval, started=started)
                with closing(generation):
                    yield generation.accepted
                    while not generation.ended:
                        for event in await generation.take():
                            yield event
        except TroupeError as error:
            self._say_if_gone(call.model)
            yield Failed(error)
        except Exception as error:
            logger.exception("request %s failed", call.request_id)
            yield Failed(ModelError(f"Model {call.model!r} failed: {last_line(error)}"))

    async def render(self, model: str, prompt: Prompt) -> Rendered:
        """A prompt's text after the chat template, and its token ids."""
        async with self.leases.lease(self.resolve(model).id) as loaded:
            (encoded,) = await loaded.encode([prompt])
        return Rendered(
            text=encoded.text,
            token_ids=tuple(encoded.encoded.input_ids),
            max_model_len=loaded.engine.max_model_len,
        )

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        async with self.leases.lease(self.resolve(model).id) as loaded:
            known = max(vocab_size(loaded.info.model) or 0, _tokens(loaded.info.tokenizer))
            if known and (largest := max(token_ids, default=0)) >= known:
                raise BadRequest(
                    f"Token id {largest} does not exist; this model has ids 0 to {known - 1}.", param="tokens"
                )
            return await loaded.decode(token_ids)

    async def spell(self, model: str, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Token ids as the vocabulary spells them."""
        async with self.leases.lease(self.resolve(model).id) as loaded:
            return await loaded.spell(token_ids)

    async def pieces(self, model: str, token_ids: Sequence[int]) -> tuple[TokenPiece, ...]:
        """What each token adds to a text, special tokens included."""
        async with self.leases.lease(self.resolve(model).id) as loaded:
            return await loaded.pieces(token_ids)

    async def embed(self, model: str, prompts: Sequence[Prompt], options: EmbedOptions) -> Embeddings:
        """A vector for each prompt."""
        async with self.leases.lease(self.resolve(model).id) as loaded:
            return await loaded.embed(prompts, options)

    async def tokenizer_info(self, model: str) -> dict[str, Any]:
        """The tokenizer's class, special tokens, chat template and `model_max_length`, as JSON values."""
        async with self.leases.lease(self.resolve(model).id) as loaded:
            return {**await loaded.tokenizer_card(), "model_max_length": loaded.engine.max_model_len}

    async def ready(self) -> None:
        """Requests can be answered from the start."""

    def check(self) -> None:
        """Raise TroupeError if the engine of a loaded model has died."""
        for model in self.leases.values().values():
            model.engine.check()

    async def close(self) -> None:
        """End what runs, unload every model."""
        await self.leases.close(CLOSE_LIMIT_S)
        await asyncio.to_thread(self._loading.close)
        for trace in self._traces.values():
            await asyncio.to_thread(trace.close)

    @asynccontextmanager
    async def _traced(self, model: LoadedModel) -> AsyncIterator[None]:
        """While a request of the model is computed: it may be part of a trace."""
        trace = self._traces.get(model.entry.id)
        if trace is None:
            yield
            return
        await asyncio.to_thread(trace.begin)
        try:
            yield
        finally:
            await asyncio.to_thread(trace.end)

    def _say_if_gone(self, key: str) -> None:
        stats = self.leases.stats()
        if key not in stats.loaded and key not in stats.loading:
            self._on_gone(key)

    async def _load(self, key: str) -> LoadedModel:
        try:
            model = await self._loading.load(self._by_id[key])
        except BaseException:
            self._on_gone(key)
            raise
        self._limits[key] = model.engine.max_model_len
        return model

    def _unload(self, key: str, model: LoadedModel) -> Awaitable[None]:
        logger.info("unloading %s", key)
        self._on_gone(key)
        # Not awaited here, where `model` would keep it alive.
        return self._loading.unload(key, model)


def _tokens(tokenizer: Any) -> int:
    """How many tokens a tokenizer has; 0 if it does not tell."""
    try:
        return len(tokenizer)
    except TypeError:
        return 0
