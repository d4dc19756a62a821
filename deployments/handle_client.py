"""A `ModelClient` over the Ray Serve handles of the model replicas: what the ingress calls."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, cast

import ray
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from deployments.config.app import AppArgs, unknown_model
from deployments.config.sources import Spec
from deployments.core.calls import Call, ChatPrompt, GenerateCall, Prompt
from deployments.core.client import ChatTexts, Embeddings, EmbedOptions, Rendered, TokenPiece
from deployments.core.errors import Overloaded, TroupeError, Unavailable, last_line
from deployments.core.events import Accepted, Event, Failed
from deployments.core.model_card import ModelCard
from deployments.large_messages import Packed, packed, unpacked
from deployments.metrics import exported
from deployments.model_registry import RegistryHandle
from deployments.openai.inside.all_captures import AllCaptures
from deployments.readiness import Waiting, as_troupe_error
from deployments.registry.catalogue import Catalogue
from deployments.registry.following import Following, followed
from deployments.routing.hint import RoutingHint

logger = logging.getLogger("ray.serve")

Handle: TypeAlias = DeploymentHandle[Any]

STATUS_LIMIT_S = 5.0
UNLOAD_LIMIT_S = 600.0
CAPTURE_LIMIT_S = 45.0
"""Longer than a store waits for a file that is being written."""


class Gate:
    """Counts the calls under way and refuses those above a cap.

    Args:
        cap: calls at once; None never refuses.
    """

    def __init__(self, cap: int | None) -> None:
        self._cap = cap
        self._under_way = 0
        self._ends: deque[float] = deque(maxlen=64)

    def enter(self) -> None:
        """Take a place.

        Raises:
            Overloaded: there is none; it says when one may be free.
        """
        if self._cap is not None and self._under_way >= self._cap:
            raise Overloaded(
                f"The server works on {self._under_way} requests, as many as it may (max_concurrent_requests).",
                retry_after=self._retry_after(),
            )
        self._under_way += 1

    def leave(self) -> None:
        """Give the place back."""
        self._under_way -= 1
        self._ends.append(time.monotonic())

    def _retry_after(self) -> int:
        """Seconds in which as many calls end as wait in a full house: a queue's length over its pace (Little's law)."""
        if len(self._ends) < 2:
            return 1
        pace = (len(self._ends) - 1) / max(self._ends[-1] - self._ends[0], 1e-3)
        return max(1, min(60, round(self._under_way / pace)))


class HandleClient:
    """A `ModelClient` over handles.

    Args:
        args: the application's configuration.
        pools: a handle of each deployment of model replicas, by the pool's name.
        registry: a handle of the registry of models that come while the server runs.
    """

    def __init__(self, args: AppArgs, pools: Mapping[str, Handle], registry: Handle | None = None) -> None:
        self._args = args
        self._catalogue = Catalogue(args)
        self._following = None if registry is None else Following(self._catalogue, RegistryHandle(registry))
        # Calls go straight to the replica by gRPC, which takes a millisecond less than Ray's object store.
        self._pools = {name: handle.options(_by_reference=False) for name, handle in pools.items()}
        self._pool_of = args.pool_of()
        self._gate = Gate(args.max_concurrent_requests)
        self._several = _several_ingresses()
        self._waiting = Waiting()
        self._answering: set[str] = set()

    def models(self) -> Sequence[ModelCard]:
        """Every configured model; its limits and fingerprint once a request for it was accepted."""
        return self._catalogue.models()

    def resolve(self, name: str) -> ModelCard:
        """The model with this id or alias.

        Raises:
            ModelNotFound: there is none.
        """
        return self._catalogue.resolve(name)

    async def generate(self, call: Call) -> AsyncGenerator[Event, None]:
        """The events of a call; a failure is the last of them. Closing the generator stops the computation.

        A call whose replica dies or drains before it has given anything but `Accepted` is sent once more.
        """
        call = replace(call, spec=self._spec(call.model))
        try:
            await self._started(self._pool(call.model))
            self._gate.enter()
        except TroupeError as error:
            yield Failed(error)
            return
        accepted = given = retried = False
        try:
            while True:
                try:
                    async with self._answer(call) as events:
                        async for event in events:
                            if isinstance(event, Failed):
                                raise event.error
                            if isinstance(event, Accepted):
                                self._catalogue.learn(call.model, event.max_model_len, event.fingerprint, event.answers)
                                if accepted:
                                    continue
                                accepted = True
                            else:
                                given = True
                            yield event
                    return
                except Exception as error:
                    failure = as_troupe_error(error)
                if given or retried or not isinstance(failure, Unavailable):
                    yield Failed(failure)
                    return
                retried = True
                logger.warning("request %s: %s Sent once more.", call.request_id, failure)
        finally:
            self._gate.leave()

    async def render(self, model: str, prompt: Prompt, *, expect: str = "") -> Rendered:
        """A prompt's text after the chat template, and its token ids."""
        return cast(Rendered, await self._ask("render", model, prompt, expect=expect))

    async def chat_texts(self, model: str, prompts: Sequence[ChatPrompt], *, expect: str = "") -> ChatTexts:
        """Conversations as the chat template writes them."""
        return cast(ChatTexts, await self._ask("chat_texts", model, prompts, expect=expect))

    async def detokenize(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> str:
        """The text of token ids, special tokens included."""
        return cast(str, await self._ask("detokenize", model, token_ids, expect=expect))

    async def spell(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> tuple[str, ...]:
        """Token ids as the vocabulary spells them."""
        return cast(tuple[str, ...], await self._ask("spell", model, token_ids, expect=expect))

    async def pieces(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> tuple[TokenPiece, ...]:
        """What each token adds to a text."""
        return cast(tuple[TokenPiece, ...], await self._ask("pieces", model, token_ids, expect=expect))

    async def embed(
        self, model: str, prompts: Sequence[Prompt], options: EmbedOptions, *, expect: str = ""
    ) -> Embeddings:
        """A vector for each prompt."""
        return cast(Embeddings, await self._ask("embed", model, prompts, options, expect=expect))

    async def modules(self, model: str, pattern: str) -> dict[str, Any]:
        """What can be captured and changed inside a model, as JSON values."""
        return cast(dict[str, Any], await self._ask("modules", model, pattern))

    @property
    def captures(self) -> AllCaptures:
        """The captures of all replicas."""
        return AllCaptures(self._capture_answers)

    async def _capture_answers(self, method: str, *arguments: Any) -> list[Any]:
        """What the store of every replica answers."""
        answers = await self._tell_all("capture", self._pools, method, *arguments, limit=CAPTURE_LIMIT_S)
        for answer in answers:
            if isinstance(answer, Failed):
                raise answer.error
        return answers

    async def tokenizer_info(self, model: str, *, expect: str = "") -> dict[str, Any]:
        """What a client needs to know of the tokenizer, and the model's fingerprint, as JSON values."""
        return cast(dict[str, Any], await self._ask("tokenizer_info", model, expect=expect))

    async def fingerprint_parts(self, model: str, *, expect: str = "") -> dict[str, Any]:
        """The model's `fingerprint` and what it is made of, as JSON values."""
        return cast(dict[str, Any], await self._ask("fingerprint_parts", model, expect=expect))

    async def metrics(self) -> str:
        """The metrics of all replicas, which Ray exports some seconds after they have changed."""
        return await exported(ray.serve.get_replica_context().app_name)

    async def status(self) -> list[dict[str, Any]]:
        """One entry for every replica that answers within `STATUS_LIMIT_S` seconds."""
        return await self._tell_all("status", self._pools, limit=STATUS_LIMIT_S)

    async def load(self, model: str) -> None:
        """Load a model on the replica that a request for it would go to."""
        await self._ask("load", model)

    async def unload(self, model: str) -> bool:
        """Unload a model wherever it is loaded, once nobody uses it; False if it was loaded nowhere."""
        card = self.resolve(model)
        pool = self._pool(card.id)
        return any(await self._tell_all("unload", [pool], self._spec(card.id) or card.id, limit=UNLOAD_LIMIT_S))

    async def drain(self, on: bool = True) -> None:
        """Refuse new calls everywhere and end those that run; or take calls again."""
        await self._tell_all("drain", self._pools, on, limit=STATUS_LIMIT_S)

    async def discover(self, name: str) -> bool:
        """Whether the registry has a model of this name, which is known then."""
        if self._following is None:
            return False
        self._following.start()
        return await self._following.discover(name)

    async def add_model(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Add the model that a request describes; its state, and whether it is new."""
        return await followed(self._following).add(body, self)

    async def try_adapter(self, spec: Spec) -> None:
        """Compare an adapter with its base on a replica; see `Trials`."""
        await self._ask_replica(self._pool_of[spec.like], spec.entry.base or "", "try_adapter", spec.model_dump_json())

    async def try_load(self, spec: Spec) -> None:
        """Load a model that the registry does not have yet; see `Trials`."""
        await self._ask_replica(self._pool_of[spec.like], spec.entry.id, "ask", "load", spec.model_dump_json())

    async def end_trial(self, spec: Spec) -> None:
        """Unload a model that was only tried."""
        await self._tell_all("unload", [self._pool_of[spec.like]], spec.model_dump_json(), limit=UNLOAD_LIMIT_S)

    async def _ask_replica(self, pool: str, place: str, method: str, *arguments: str) -> None:
        """Ask the replica of a pool that has a model, or can load it, to try one."""
        handle = (await self._started(pool)).options(method_name=method, multiplexed_model_id=place, session_id="")
        await _found(handle.remote(*arguments))

    async def remove_model(self, name: str) -> int:
        """Remove a model that was added; on how many replicas it was loaded."""
        spec = await followed(self._following).remove(name)
        pool = self._pool_of[spec.like]
        return sum(await self._tell_all("unload", [pool], spec.model_dump_json(), limit=UNLOAD_LIMIT_S))

    async def model_states(self, *, refresh: bool = False) -> list[dict[str, Any]]:
        """Every model and every folder that is not one, with its state, as JSON values."""
        return await followed(self._following).states(await self.status(), refresh=refresh)

    def start(self) -> None:
        """Follow the registry; needs a running event loop."""
        if self._following is not None:
            self._following.start()

    def _pool(self, model: str) -> str:
        """The pool of a model: if it came while the server runs, that of the model that it is like."""
        spec = self._catalogue.spec(model)
        pool = self._pool_of.get(model if spec is None else spec.like)
        if pool is None:  # Removed since its name was resolved.
            raise unknown_model(model, self._catalogue.listed())
        return pool

    def _spec(self, model: str) -> str:
        """What a replica needs to know of a model that came while the server runs, as JSON; else empty."""
        spec = self._catalogue.spec(model)
        return "" if spec is None else spec.model_dump_json()

    async def ready(self) -> None:
        """Raise Unavailable before each deployment of models has had a replica and the folders have been searched."""
        for name in self._pools:
            await self._started(name)
        if self._following is not None:
            self._following.check()

    async def _started(self, name: str) -> Handle:
        """The handle of a pool, to which Serve may send requests now. It lets them wait for ever for a first replica.

        Raises:
            Unavailable: its replicas have not started yet.
        """
        pool = self._pools[name]
        if name not in self._answering:
            if (error := await self._waiting.error(pool.app_name, pool.deployment_name)) is not None:
                raise error
            self._answering.add(name)
        return pool

    @asynccontextmanager
    async def _answer(self, call: Call) -> AsyncIterator[AsyncIterable[Event]]:
        """What a replica answers, cancelled if it is left early. What does not stream crosses in one piece."""
        pool = self._pools[self._pool(call.model)]
        handle = pool.options(
            method_name="generate" if call.stream else "answer",
            stream=call.stream,
            **self._routed(call.model, call.affinity, call.blocks if isinstance(call, GenerateCall) else ()),
        )
        answer = handle.remote(await packed(call))
        try:
            yield _unpacked(answer) if call.stream else _each(await unpacked(await answer))
        except BaseException:
            answer.cancel()
            raise

    async def _ask(self, method: str, model: str, *arguments: Any, **options: Any) -> Any:
        """The answer of a replica that has the model, asked once more when the first is lost."""
        key = self.resolve(model).id
        pool = await self._started(self._pool(key))
        handle = pool.options(method_name="ask", **self._routed(key))
        given = [await packed(argument) for argument in arguments]
        ask = partial(handle.remote, method, self._spec(key) or key, *given, **options)
        try:
            return await _found(ask())
        except Unavailable:
            return await _found(ask())

    def _routed(self, model: str, affinity: str | None = None, blocks: tuple[str, ...] = ()) -> dict[str, str]:
        """What the router goes by: replicas hold the base of an adapter, and an adapter stays on one of them."""
        place = self._catalogue.place_of(model)
        # Another ingress does not know where this one has sent a conversation: it goes by its key alone.
        hint = RoutingHint(affinity or ("" if place == model else model), () if affinity and self._several else blocks)
        return {"multiplexed_model_id": place, "session_id": str(hint)}

    async def _tell_all(self, method: str, pools: Iterable[str], *arguments: Any, limit: float) -> list[Any]:
        """The answers of all replicas of some pools; replicas that fail to answer are logged and left out."""
        asked = [(await self._started(name)).broadcast(method, *arguments) for name in pools]
        try:
            answers = await asyncio.gather(
                *(each.results_async(timeout_s=limit, return_exceptions=True) for each in asked)
            )
        except TimeoutError:
            raise Unavailable(f"A replica has not answered for {limit:g} s.", retry_after=5) from None
        found = []
        for answer in (answer for group in answers for answer in group):
            if isinstance(answer, BaseException):
                logger.warning("a replica did not answer to %s: %s", method, last_line(answer))
            else:
                found.append(answer)
        return found


async def _found(answer: DeploymentResponse[Any]) -> Any:
    """What a replica answers to a call, which is cancelled with its caller.

    Raises:
        TroupeError: it has failed, or was lost.
    """
    try:
        found = await unpacked(await answer)
    except asyncio.CancelledError:
        answer.cancel()
        raise
    except Exception as error:
        raise as_troupe_error(error) from None
    if isinstance(found, Failed):
        raise found.error
    return found


async def _unpacked(events: AsyncIterable[Event | Packed]) -> AsyncGenerator[Event, None]:
    async for event in events:
        yield await unpacked(event)


async def _each(events: Sequence[Event]) -> AsyncGenerator[Event, None]:
    for event in events:
        yield event


def _several_ingresses() -> bool:
    """Whether this process is one of several replicas of its deployment."""
    try:
        return (ray.serve.get_replica_context().world_size or 1) > 1
    except ray.serve.exceptions.RayServeException:
        return False
