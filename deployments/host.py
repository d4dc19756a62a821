"""The models of one process: loaded on demand, leased to requests, each behind its engine.

`ModelHost` is what a replica serves to the ingress, and what `deployments.local` serves without Ray.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from deployments.client import Rendered
from deployments.config import AppArgs, ModelEntry, unknown_model
from deployments.engine.choice import build_engine
from deployments.engine.protocol import Engine, EngineRequest
from deployments.errors import (
    BadRequest,
    ContextOverflow,
    LoadTimeout,
    ModelError,
    ModelLoadFailed,
    TroupeError,
    UnsupportedParameter,
    last_line,
)
from deployments.generation import Generation
from deployments.images import decode_image, split_images
from deployments.inspection import Inspection
from deployments.leases import Leases
from deployments.messages import (
    ChatPrompt,
    Event,
    Failed,
    GenerateCall,
    ModelCard,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from deployments.threads import Worker
from model_loaders.contract import ModelInfo
from model_loaders.hooks import Encoded, Hooks
from model_loaders.resolve import load_model_info
from model_loaders.tokenizer_card import tokenizer_card

logger = logging.getLogger("troupe.host")

T = TypeVar("T")

HOOK_LIMIT_S = 60.0
CLOSE_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as text, where there is one, and as token ids and tensors."""

    text: str | None
    encoded: Encoded


def default_device() -> str:
    """Where loaders put their models unless told otherwise: the first GPU this process sees, else the CPU."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


class LoadedModel:
    """A model with its hooks and engine. Encoding runs in a thread of its own."""

    def __init__(self, entry: ModelEntry, info: ModelInfo) -> None:
        self.entry = entry
        self.info = info
        self.hooks = Hooks(info)
        self.engine: Engine = build_engine(info, entry.engine)
        self._codec = Worker(f"codec-{entry.id}")

    async def encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Render and encode prompts off the event loop."""
        return await self._off_loop(lambda: [self._encode(prompt) for prompt in prompts])

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return await self._off_loop(lambda: self.hooks.decode(token_ids, skip_special_tokens=False))

    def close(self) -> None:
        """End the engine, run the loader's `close`, free memory. Blocks."""
        self.engine.close(CLOSE_LIMIT_S)
        self._codec.stop()
        if self.info.close is not None:
            self.info.close()

    async def _off_loop(self, function: Callable[[], T]) -> T:
        try:
            return await self._codec.run(function, HOOK_LIMIT_S)
        except TimeoutError as error:
            raise ModelError(
                f"A hook of model {self.entry.id!r} has not returned for {HOOK_LIMIT_S:.0f} s (at {error})."
            ) from None

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        match prompt:
            case TokensPrompt():
                return EncodedPrompt(text=None, encoded=Encoded(input_ids=list(prompt.token_ids)))
            case TextPrompt():
                encoded = self.hooks.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
                return EncodedPrompt(text=prompt.text, encoded=encoded)
            case ChatPrompt():
                return self._encode_chat(prompt)

    def _encode_chat(self, prompt: ChatPrompt) -> EncodedPrompt:
        chat, sources = split_images(prompt)
        if sources:
            self.hooks.check_images(sources[0].param)
        text = self.hooks.render(chat)
        encoded = self.hooks.encode(text, images=[decode_image(source) for source in sources])
        return EncodedPrompt(text=text, encoded=encoded)


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
        self.args = args
        self._given = dict(given or {})
        self._on_gone = on_gone
        self.device = device or default_device()
        self._entries = args.by_name()
        self._by_id = {entry.id: entry for entry in args.models}
        self._loaders: dict[str, Worker] = {}
        self._limits: dict[str, int] = {}
        self.leases: Leases[LoadedModel] = Leases(
            self._load,
            self._unload,
            capacity=args.max_models_per_replica,
            patience=args.swap_patience_s,
            retry_after=lambda key: self._by_id[key].load_retry_s,
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
        """Load the pinned models now; a failure is logged and answered to the requests that ask for it."""
        for entry in self.args.models:
            if entry.pinned:
                try:
                    async with self.leases.lease(entry.id):
                        pass
                except TroupeError as error:
                    logger.error("preloading %s: %s", entry.id, error)

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Event, None]:
        """The events of a call; a failure is the last of them. Closing the generator stops the computation."""
        try:
            async with self.leases.lease(call.model) as model:
                prompts = await self._prompts(model, call)
                requests, generation = await self._prepare(model, call, prompts)
                inspection = Inspection(model.info, call, prompts) if model.info.done_callback else None
                try:
                    generation.submit(model.engine, requests)
                    async for event in generation.events():
                        if inspection is not None and (call_back := inspection.ended(event)) is not None:
                            await asyncio.to_thread(call_back)
                        yield event
                finally:
                    generation.cancel(model.engine)
        except TroupeError as error:
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
            return await loaded.decode(token_ids)

    async def tokenizer_info(self, model: str) -> dict[str, Any]:
        """The tokenizer's class, special tokens, chat template and `model_max_length`, as JSON values."""
        async with self.leases.lease(self.resolve(model).id) as loaded:
            return {**tokenizer_card(loaded.info), "model_max_length": loaded.engine.max_model_len}

    def check(self) -> None:
        """Raise TroupeError if the engine of a loaded model has died."""
        for model in self.leases.values().values():
            model.engine.check()

    async def close(self) -> None:
        """End what runs, unload every model."""
        await self.leases.close(CLOSE_LIMIT_S)

    async def _prompts(self, model: LoadedModel, call: GenerateCall) -> list[EncodedPrompt]:
        _refuse_unsupported(call.sampling, model)
        return await model.encode(call.prompts)

    async def _prepare(
        self, model: LoadedModel, call: GenerateCall, prompts: list[EncodedPrompt]
    ) -> tuple[list[EngineRequest], Generation]:
        texts = [prompt.text for prompt in prompts]
        if call.echo:
            texts = [
                text if text is not None else await model.decode(prompt.encoded.input_ids)
                for text, prompt in zip(texts, prompts, strict=True)
            ]
        limit = model.engine.max_model_len
        generation = Generation(call, prompts, texts, interval=self.args.stream_interval_ms / 1000, max_model_len=limit)
        return [
            request for prompt in prompts for request in generation.requests_for(prompt, _budget(call, prompt, limit))
        ], generation

    async def _load(self, key: str) -> LoadedModel:
        try:
            model = await self._load_in_thread(self._by_id[key])
        except TroupeError:
            self._on_gone(key)
            raise
        self._limits[key] = model.engine.max_model_len
        return model

    async def _load_in_thread(self, entry: ModelEntry) -> LoadedModel:
        key = entry.id
        worker = self._loaders.setdefault(key, Worker(f"load-{key}"))
        try:
            return await worker.run(lambda: self._load_now(entry), entry.load_timeout_s)
        except TimeoutError as error:
            raise LoadTimeout(
                f"Loader {entry.loader} of model {key!r} has not returned for {entry.load_timeout_s:g} s (at {error})."
            ) from None

    def _load_now(self, entry: ModelEntry) -> LoadedModel:
        started = time.monotonic()
        info = self._given.get(entry.id) or load_model_info(entry.loader, entry.kwargs, self.device)
        info.model_name = info.model_name or entry.id
        try:
            model = LoadedModel(entry, info)
        except TroupeError:
            raise
        except Exception as error:
            logger.exception("model %s has no engine", entry.id)
            raise ModelLoadFailed(f"Model {entry.id!r} of loader {entry.loader}: {last_line(error)}") from error
        logger.info("model %s is ready after %.1f s", entry.id, time.monotonic() - started)
        return model

    async def _unload(self, key: str, model: LoadedModel) -> None:
        logger.info("unloading %s", key)
        self._on_gone(key)
        await asyncio.to_thread(model.close)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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


_DEFAULTS = SamplingParams()


def _refuse_unsupported(sampling: SamplingParams, model: LoadedModel) -> None:
    for field in fields(SamplingParams):
        name = field.name
        if name not in model.engine.supports and getattr(sampling, name) != getattr(_DEFAULTS, name):
            raise UnsupportedParameter(f"Model {model.entry.id!r} cannot honour {name}.", param=name)
