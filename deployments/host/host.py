"""The models of one process: loaded on demand, leased to requests, each with its engine.

`ModelHost` is what a replica serves to the ingress, and what `deployments.local` serves without Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import torch

from deployments.config.app import AppArgs, unknown_model
from deployments.core.calls import Call, GenerateCall, Prompt, SamplingParams, TranscribeCall
from deployments.core.client import Embeddings, EmbedOptions, Rendered
from deployments.core.errors import (
    BadRequest,
    ContextOverflow,
    ModelError,
    TroupeError,
    Unavailable,
    UnsupportedParameter,
    last_line,
)
from deployments.core.events import Accepted, Event, Failed
from deployments.core.model_card import ModelCard
from deployments.engine.base.admission import ALWAYS, request_field, vocab_size
from deployments.engine.base.protocol import EngineRequest
from deployments.host.generation import Generation
from deployments.host.inspection import Inspection
from deployments.host.leases import Leases
from deployments.host.loaded_model import CLOSE_LIMIT_S, EncodedPrompt, LoadedModel
from deployments.host.loading import Loading
from deployments.host.profiling import Trace
from deployments.host.tested_versions import warn_of_untested_transformers
from model_loaders.contract import ModelInfo

logger = logging.getLogger("troupe.host")

_AT_ONCE = 16
"""Choices that a request queues before others have their turn."""


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
            "waiting": stats.waiting,
            "loads": stats.loads,
            "load_failures": stats.failures,
            "evictions": stats.evictions,
        }

    async def generate(self, call: Call) -> AsyncGenerator[Event, None]:
        """The events of a call; a failure is the last of them. Closing the generator stops the computation."""
        try:
            if self._draining:
                raise Unavailable(
                    "The server is draining: it finishes running requests and refuses new ones.", retry_after=5
                )
            started = time.monotonic()
            async with self.leases.lease(call.model) as model, self._traced(model):
                if isinstance(call, TranscribeCall):
                    _refuse_unsupported(call.sampling, model)
                    interval = self.args.stream_interval_ms / 1000
                    async with aclosing(model.transcribe(call, interval=interval)) as heard:
                        async for event in heard:
                            yield event
                    return
                prompts = await self._prompts(model, call)
                generation = await self._prepare(model, call, prompts, started)
                inspection = Inspection(model.info, call, prompts) if model.info.done_callback else None
                try:
                    await _submit(model, generation, prompts)
                    async with aclosing(generation.events()) as events:
                        async for event in events:
                            if inspection is not None and (call_back := inspection.ended(event)) is not None:
                                await asyncio.to_thread(call_back)
                            yield replace(event, load=model.load_id) if isinstance(event, Accepted) else event
                finally:
                    generation.cancel(model.engine)
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
            beyond = [i for i in token_ids if 0 < known <= i]
            if beyond:
                raise BadRequest(
                    f"Token id {beyond[0]} does not exist; this model has ids 0 to {known - 1}.", param="tokens"
                )
            return await loaded.decode(token_ids)

    async def spell(self, model: str, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Token ids as the vocabulary spells them."""
        async with self.leases.lease(self.resolve(model).id) as loaded:
            return await loaded.spell(token_ids)

    async def embed(self, model: str, prompts: Sequence[Prompt], options: EmbedOptions) -> Embeddings:
        """A vector for each prompt."""
        async with self.leases.lease(self.resolve(model).id) as loaded:
            return await loaded.embed(prompts, options)

    async def tokenizer_info(self, model: str) -> dict[str, Any]:
        """The tokenizer's class, special tokens, chat template and `model_max_length`, as JSON values."""
        async with self.leases.lease(self.resolve(model).id) as loaded:
            return {**await loaded.tokenizer_card(), "model_max_length": loaded.engine.max_model_len}

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

    async def _prompts(self, model: LoadedModel, call: GenerateCall) -> list[EncodedPrompt]:
        model.check_text()
        _refuse_unsupported(call.sampling, model)
        prompts = await model.encode(call.prompts, fits=call.truncate_prompt is None)
        if call.truncate_prompt is None:
            return prompts
        most = call.truncate_prompt
        if most < 0:
            most = max(
                1, model.engine.max_model_len - (1 if call.sampling.max_tokens is None else call.sampling.max_tokens)
            )
        return [await _truncated(model, prompt, most) for prompt in prompts]

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

    async def _prepare(
        self, model: LoadedModel, call: GenerateCall, prompts: list[EncodedPrompt], started: float
    ) -> Generation:
        texts = [prompt.text for prompt in prompts]
        if call.echo:
            texts = [
                text if text is not None else await model.decode(prompt.encoded.input_ids)
                for text, prompt in zip(texts, prompts, strict=True)
            ]
        return Generation(
            call,
            prompts,
            texts,
            interval=self.args.stream_interval_ms / 1000,
            max_model_len=model.engine.max_model_len,
            started=started if model.entry.api.usage_timings else None,
        )

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


async def _truncated(model: LoadedModel, prompt: EncodedPrompt, most: int) -> EncodedPrompt:
    """A prompt's last tokens.

    Raises:
        UnsupportedParameter: the tokens stand for images or the like, which have no part that could be left out.
    """
    ids = prompt.encoded.input_ids
    if len(ids) <= most:
        return prompt
    if prompt.encoded.model_inputs:
        raise UnsupportedParameter(
            "Only a prompt of nothing but text can be truncated; leave 'truncate_prompt_tokens' out.",
            param="truncate_prompt_tokens",
        )
    kept = ids[-most:]
    text = None if prompt.text is None else await model.decode(kept)
    return EncodedPrompt(text=text, encoded=replace(prompt.encoded, input_ids=kept))


async def _submit(model: LoadedModel, generation: Generation, prompts: Sequence[EncodedPrompt]) -> None:
    """Queue a generation off the event loop: a thousand choices may each have a million ids to check.

    Generations that are submitted at the same time take turns.

    Raises:
        TroupeError: the engine refuses one of the requests.
    """

    def begin() -> list[EngineRequest]:
        requests = _requests(model, generation, prompts)
        generation.submit(model.engine, requests[:_AT_ONCE])
        return requests

    requests = await model.submitting.run(begin)
    for first in range(_AT_ONCE, len(requests), _AT_ONCE):
        some = requests[first : first + _AT_ONCE]
        await model.submitting.run(partial(generation.submit, model.engine, some, first))


def _requests(model: LoadedModel, generation: Generation, prompts: Sequence[EncodedPrompt]) -> list[EngineRequest]:
    """What a generation asks the engine for; see `_budget` for its errors."""
    call, limit = generation.call, model.engine.max_model_len
    budgets = [_budget(call, prompt, limit) for prompt in prompts]
    return [
        request
        for prompt, budget in zip(prompts, budgets, strict=True)
        for request in generation.requests_for(prompt, budget)
    ]


def _budget(call: GenerateCall, prompt: EncodedPrompt, limit: int) -> int:
    """How many tokens may be generated after a prompt: what was asked for, at most what is left.

    Raises:
        BadRequest: the prompt is empty.
        ContextOverflow: the prompt leaves no room.
    """
    length = len(prompt.encoded.input_ids)
    if length == 0:
        raise BadRequest(f"{call.prompt_param} is empty: nothing to continue.", param=call.prompt_param)
    asked = call.sampling.max_tokens
    if length > limit or (length == limit and asked != 0):
        raise ContextOverflow(limit, length, param=call.prompt_param)
    left = limit - length
    return left if asked is None else min(asked, left)


def _tokens(tokenizer: Any) -> int:
    """How many tokens a tokenizer has; 0 if it does not tell."""
    try:
        return len(tokenizer)
    except TypeError:
        return 0


_DEFAULTS = SamplingParams()


def _refuse_unsupported(sampling: SamplingParams, model: LoadedModel) -> None:
    for field in fields(SamplingParams):
        name = field.name
        if name not in model.engine.supports | ALWAYS and getattr(sampling, name) != getattr(_DEFAULTS, name):
            asked = request_field(name, sampling)
            raise UnsupportedParameter(f"Model {model.entry.id!r} cannot honor {asked}.", param=asked)
