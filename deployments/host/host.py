"""The models of one process: loaded on demand, leased to requests, each with its engine.

`ModelHost` is what a replica serves to the ingress, and what `deployments.local` serves without Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import replace
from typing import Any

from deployments.adapters.refused import AdapterRefused
from deployments.config.app import AppArgs
from deployments.config.sources import Spec
from deployments.core.calls import TURN, Call, ChatPrompt, Prompt, TranscribeCall
from deployments.core.client import ChatTexts, Embeddings, EmbedOptions, Rendered, TokenPiece
from deployments.core.errors import ModelError, TroupeError, Unavailable, last_line
from deployments.core.events import Event, Failed
from deployments.core.fingerprint import check_expected, weights_of
from deployments.core.model_card import ModelCard
from deployments.core.token_ids import TokenIds, check_known
from deployments.core.transcript import TranscriptionStarted
from deployments.engine.base.stream_pace import StreamPace
from deployments.engine.library.tested_versions import warn_of_untested_transformers
from deployments.host.adapters import try_adapter
from deployments.host.generation import Generation
from deployments.host.inside.captures import CaptureStore
from deployments.host.inside.capturing import modules_of
from deployments.host.loaded_model import CLOSE_LIMIT_S, LoadedModel
from deployments.host.loading import Loading, default_device
from deployments.host.places import Places
from deployments.host.profiling import Trace, traced
from deployments.registry.catalogue import Catalogue, date_models
from deployments.registry.following import Following, followed
from deployments.registry.registry import ModelRegistry
from deployments.registry.version import Rewritten
from model_loaders.contract import ModelInfo
from model_loaders.weights.progress import loaded_parts

logger = logging.getLogger("troupe.host")

_LOADS = 5
"""Loads of one request, if the files change during each."""


class ModelHost:
    """A `ModelClient` over models loaded in this process.

    Args:
        args: the application's configuration.
        device: where loaders put their models, such as "cuda:0".
        on_gone: called with the id of a model that was unloaded or could not be loaded.
        given: models that are loaded already, by id.
        registry: of models that come while the server runs; a replica has none, its calls bring them.
        place: names this process in the ids of captures.
        pace: makes the pace of the streams from `stream_interval_ms` in seconds; without one, it is theirs however many
            there are.

    Attributes:
        captures: of the requests' states.
        following: keeps the models as the registry has them; to be started in the event loop.
    """

    def __init__(
        self,
        args: AppArgs,
        device: str | None = None,
        *,
        on_gone: Callable[[str], None] = lambda key: None,
        given: Mapping[str, ModelInfo] | None = None,
        registry: ModelRegistry | None = None,
        place: str = "",
        pace: Callable[[float], StreamPace] = StreamPace,
    ) -> None:
        warn_of_untested_transformers()
        self.args = args
        self.device = device or default_device()
        self.captures = CaptureStore(args.api.captures, place)
        self._loading = Loading(
            self.device, api=args.api, given=given, captures=self.captures, host_memory_gib=args.host_memory_gib
        )
        date_models(args)
        self._catalogue = Catalogue(args, given or {})
        self.following = None if registry is None else Following(self._catalogue, registry)
        self._admitted: dict[str, str] = {}
        self._places = Places(args, self._catalogue, self._loading, on_gone)
        self.leases = self._places.leases
        self._pace = pace(args.stream_interval_ms / 1000)
        self._draining = False
        self._traces = {
            entry.id: Trace(entry.profile_dir, entry.id) for entry in args.models if entry.profile_dir is not None
        }

    def models(self) -> Sequence[ModelCard]:
        """Every configured model; its limits and fingerprint once it was loaded."""
        return self._catalogue.models()

    def resolve(self, name: str) -> ModelCard:
        """The model with this id or alias; see `Catalogue.entry` for its errors."""
        return self._catalogue.resolve(name)

    async def preload(self) -> None:
        """Load what is to be there from the start; a failure is logged, and answered to requests that ask for it."""
        self._loading.warm()
        first = {entry.id for entry in self.args.models if entry.pinned or entry.preload}
        for entry in self.args.models:
            if entry.id in first or entry.base in first:
                try:
                    await self.load(entry.id)
                except TroupeError as error:
                    if not isinstance(error, AdapterRefused):  # The log has it already.
                        logger.error("preloading %s: %s", entry.id, error)

    async def load(self, model: str) -> None:
        """Load a model now, as a request for it would."""
        async with self.lease(model):
            pass

    async def unload(self, model: str) -> bool:
        """Unload a model once nobody uses it; False if it is not loaded. A later request loads it again."""
        return await self._places.evict(self.resolve(model).id)

    async def drain(self, on: bool = True) -> None:
        """Refuse new calls and end those that run; or take calls again."""
        self._draining = on

    async def status(self) -> list[dict[str, Any]]:
        """`snapshot`, as the only replica."""
        return [self.snapshot()]

    def snapshot(self) -> dict[str, Any]:
        """What this process holds and does at this moment, as JSON values."""
        return {
            "pid": os.getpid(),
            "device": self.device,
            "draining": self._draining,
            "loaded_parts": loaded_parts(),
            **self._places.snapshot(),
            **self.captures.stats(),
        }

    async def generate(self, call: Call) -> AsyncGenerator[Event, None]:
        """The events of a call; a failure is the last of them. Closing the generator stops the computation."""
        started = time.monotonic()
        TURN.set(call.turn)
        if call.spec:
            self.admit(call.spec)
        try:
            if self._draining:
                raise Unavailable("The server is draining: it ends what runs and takes nothing new.", retry_after=5)
            async with self.lease(call.model, call.expect) as model, traced(self._traces.get(model.entry.id)):
                with self._pace.streams(_streams(call)) as interval:
                    if isinstance(call, TranscribeCall):
                        async with aclosing(model.transcribe(call, interval=interval)) as heard:
                            async for event in heard:
                                if isinstance(event, TranscriptionStarted):
                                    event = replace(event, fingerprint=model.fingerprint)
                                yield event
                        return
                    generation = await Generation.start(model, call, interval=interval, started=started)
                    with closing(generation):
                        yield generation.accepted
                        while not generation.ended:
                            for event in await generation.take():
                                yield event
        except TroupeError as error:
            self._places.say_if_gone(self.place_of(call.model))
            yield Failed(error)
        except Exception as error:
            logger.exception("request %s failed", call.request_id)
            yield Failed(ModelError(f"Model {call.model!r} failed: {last_line(error)}"))

    async def render(self, model: str, prompt: Prompt, *, expect: str = "") -> Rendered:
        """A prompt's text after the chat template, and its token ids."""
        async with self.lease(model, expect) as loaded:
            (encoded,) = await loaded.encode([prompt])
        return Rendered(
            text=encoded.text,
            token_ids=TokenIds(encoded.encoded.input_ids),
            max_model_len=loaded.engine.max_model_len,
            fingerprint=loaded.fingerprint,
        )

    async def chat_texts(self, model: str, prompts: Sequence[ChatPrompt], *, expect: str = "") -> ChatTexts:
        """Conversations as the chat template writes them."""
        async with self.lease(model, expect) as loaded:
            return ChatTexts(texts=await loaded.chat_texts(prompts), fingerprint=loaded.fingerprint)

    async def detokenize(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> str:
        """The text of token ids, special tokens included."""
        async with self.lease(model, expect) as loaded:
            check_known(token_ids, loaded.info.model, loaded.info.tokenizer)
            return await loaded.decode(token_ids)

    async def spell(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> tuple[str, ...]:
        """Token ids as the vocabulary spells them."""
        async with self.lease(model, expect) as loaded:
            return await loaded.spell(token_ids)

    async def pieces(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> tuple[TokenPiece, ...]:
        """What each token adds to a text, special tokens included."""
        async with self.lease(model, expect) as loaded:
            return await loaded.pieces(token_ids)

    async def embed(
        self, model: str, prompts: Sequence[Prompt], options: EmbedOptions, *, expect: str = ""
    ) -> Embeddings:
        """A vector for each prompt."""
        TURN.set(options.turn)
        async with self.lease(model, expect) as loaded:
            return await loaded.embed(prompts, options)

    async def modules(self, model: str, pattern: str) -> dict[str, Any]:
        """What can be captured and changed inside a model, as JSON values."""
        async with self.lease(model) as loaded:
            return await modules_of(loaded, pattern)

    async def tokenizer_info(self, model: str, *, expect: str = "") -> dict[str, Any]:
        """What a client needs to know of the tokenizer, and the model's fingerprint, as JSON values."""
        async with self.lease(model, expect) as loaded:
            facts = {"model_max_length": loaded.engine.max_model_len, "fingerprint": loaded.fingerprint}
            return {**await loaded.tokenizer_card(), **facts}

    async def fingerprint_parts(self, model: str, *, expect: str = "") -> dict[str, Any]:
        """The model's `fingerprint` and what it is made of, as JSON values."""
        async with self.lease(model, expect) as loaded:
            found = loaded.named
        return {"model": loaded.entry.id, "fingerprint": found.name, "weights": found.weights, "setup": found.setup}

    async def discover(self, name: str) -> bool:
        """Whether the registry has a model of this name, which is known then."""
        return self.following is not None and await self.following.discover(name)

    async def add_model(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Add the model that a request describes; its state, and whether it is new."""
        return await followed(self.following).add(body, self)

    async def try_adapter(self, spec: Spec) -> None:
        """Compare an adapter with its base, which is loaded for it; see `try_adapter` for its errors."""
        if spec.parent is not None:
            self.admit(spec.parent.model_dump_json())
        async with self.lease(spec.entry.base or "") as base:
            await try_adapter(base, spec.entry)

    async def try_load(self, spec: Spec) -> None:
        """Load a model that the registry does not have yet."""
        self._catalogue.adopt(spec)
        try:
            await self.load(spec.entry.id)
        except BaseException:
            self._catalogue.drop(spec)
            raise

    async def end_trial(self, spec: Spec) -> None:
        """Unload a model that was only tried."""
        if self._catalogue.spec(spec.entry.id) is not None:
            await self._places.evict(spec.entry.id)
            self._catalogue.drop(spec)

    async def remove_model(self, name: str) -> int:
        """Remove a model that was added; 1 if it was loaded."""
        return int(await self._places.evict((await followed(self.following).remove(name)).entry.id))

    async def model_states(self, *, refresh: bool = False) -> list[dict[str, Any]]:
        """Every model and every folder that is not one, with its state, as JSON values."""
        return await followed(self.following).states(await self.status(), refresh=refresh)

    def admit(self, spec: str) -> str:
        """Know a model that came while the server runs.

        Args:
            spec: a `Spec` as JSON.

        Returns:
            The model's id.
        """
        if spec not in self._admitted:
            found = Spec.model_validate_json(spec)
            self._catalogue.adopt(found)
            others = {known: name for known, name in self._admitted.items() if name != found.entry.id}
            self._admitted = {**others, spec: found.entry.id}
        return self._admitted[spec]

    async def ready(self) -> None:
        """Requests can be answered: folders have been searched, no engine has died, and no hook hangs in one.

        Raises:
            Unavailable: see `check`, or the folders are still searched.
        """
        if self.following is not None:
            self.following.check()
        try:
            self.check()
        except TroupeError as error:
            raise Unavailable(error.message) from error

    def check(self) -> None:
        """Raise TroupeError if the engine of a loaded model has died, or the GPU computes nothing more."""
        for model in self.leases.values().values():
            model.check()

    async def close(self) -> None:
        """End what runs, unload every model."""
        if self.following is not None:
            await self.following.close()
        await asyncio.to_thread(self._loading.copies.close)
        await self.leases.close(CLOSE_LIMIT_S)
        await asyncio.to_thread(self._loading.close)
        await asyncio.to_thread(self.captures.close)
        for trace in self._traces.values():
            await asyncio.to_thread(trace.close)

    @asynccontextmanager
    async def lease(self, model: str, expect: str = "") -> AsyncIterator[LoadedModel]:
        """The newest version of a model, loaded if need be, kept until the block ends.

        Args:
            expect: the weights that it is to have, `w<12>`; empty accepts any.

        Raises:
            VersionMismatch: it has other weights.
            TroupeError: it cannot be loaded.
        """
        model = self.resolve(model).id
        looked = False
        for _ in range(_LOADS):
            with contextlib.suppress(Rewritten):
                async with self._places.lease(model) as loaded:
                    if looked or expect in ("", weights_of(loaded.fingerprint)):
                        check_expected(model, loaded.fingerprint, expect)
                        yield loaded
                        return
            # Its files have changed while it was loaded; or another replica may have seen a change before this one.
            looked = True
            self._catalogue.expire(model)
        raise Unavailable(f"The files of model {model!r} change while they are loaded; try again.", retry_after=5)

    def place_of(self, model: str) -> str:
        """The id of the model that is loaded for this one: of an adapter, that of its base."""
        return self._catalogue.place_of(model)


def _streams(call: Call) -> int:
    """How many texts a call has chunks of."""
    if not call.stream:
        return 0
    return 1 if isinstance(call, TranscribeCall) else len(call.prompts) * call.n
