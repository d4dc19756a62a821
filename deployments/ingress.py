"""OpenAIIngress: the OpenAI API over HTTP, on CPU, without torch. Forwards calls to the model replicas."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, cast

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.client import Rendered
from deployments.config import AppArgs, unknown_model
from deployments.errors import ModelError, Overloaded, TroupeError, Unavailable, last_line
from deployments.messages import Accepted, Event, Failed, GenerateCall, ModelCard, Prompt
from deployments.openai.app import build_api

logger = logging.getLogger("ray.serve")


class HandleClient:
    """A `ModelClient` over the handle of the model replicas."""

    def __init__(self, args: AppArgs, handle: DeploymentHandle[Any]) -> None:
        self._args = args
        self._entries = args.by_name()
        self._handle = handle.options(_by_reference=False)
        self._limits = {entry.id: entry.engine.max_model_len for entry in args.models}

    def models(self) -> Sequence[ModelCard]:
        """Every configured model; its limits once a request for it was accepted."""
        return [replace(entry.card, max_model_len=self._limits[entry.id]) for entry in self._args.models]

    def resolve(self, name: str) -> ModelCard:
        """The model with this id or alias.

        Raises:
            ModelNotFound: there is none.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise unknown_model(name, self._args)
        return replace(entry.card, max_model_len=self._limits[entry.id])

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Event, None]:
        """The events of a call; a failure is the last of them. Closing the generator stops the computation.

        A call whose replica dies before it has given anything but `Accepted` is sent once more, elsewhere.
        """
        accepted = False
        for attempt in (1, 2):
            try:
                async for event in self._events(call):
                    if isinstance(event, Accepted):
                        self._limits[call.model] = event.max_model_len
                        if accepted:
                            continue
                        accepted = True
                    else:
                        attempt = 2
                    yield event
                return
            except Exception as error:
                failure = _as_troupe_error(error)
                if attempt == 2 or not isinstance(failure, Unavailable):
                    yield Failed(failure)
                    return
                logger.warning("request %s: %s; trying another replica", call.request_id, failure)

    async def render(self, model: str, prompt: Prompt) -> Rendered:
        """A prompt's text after the chat template, and its token ids."""
        return cast(Rendered, await self._unary("render", self.resolve(model).id, prompt))

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return cast(str, await self._unary("detokenize", self.resolve(model).id, token_ids))

    async def tokenizer_info(self, model: str) -> dict[str, Any]:
        """The tokenizer's class, special tokens, chat template and `model_max_length`, as JSON values."""
        return cast(dict[str, Any], await self._unary("tokenizer_info", self.resolve(model).id))

    async def _events(self, call: GenerateCall) -> AsyncGenerator[Event, None]:
        handle = self._handle.options(multiplexed_model_id=call.model, session_id=call.affinity or "")
        if not call.stream:
            answer = handle.options(method_name="answer").remote(call)
            try:
                events = await answer
            except asyncio.CancelledError:
                answer.cancel()
                raise
            for event in events:
                yield event
            return
        stream = handle.options(method_name="generate", stream=True).remote(call)
        try:
            async for event in stream:
                yield event
        finally:
            stream.cancel()

    async def _unary(self, method: str, model: str, *arguments: Any) -> Any:
        handle = self._handle.options(method_name=method, multiplexed_model_id=model)
        try:
            return await handle.remote(model, *arguments)
        except Exception as error:
            raise _as_troupe_error(error) from error


@serve.deployment(name="OpenAIIngress", max_ongoing_requests=10_000, graceful_shutdown_timeout_s=60)
@serve.ingress()
class OpenAIIngress:
    """Serves the OpenAI routes."""

    def __init__(self, args: AppArgs, replicas: DeploymentHandle[Any]) -> None:
        self._args = args
        self._client = HandleClient(args, replicas)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._client, self._args.api)


def _as_troupe_error(error: Exception) -> TroupeError:
    """What a client is told of a failure on the way to a replica or in it."""
    cause = getattr(error, "cause", None)
    if isinstance(error, TroupeError):
        return error
    if isinstance(cause, TroupeError):
        return cause
    if isinstance(error, BackPressureError):
        return Overloaded("The request queue is full. Try again soon.", retry_after=5)
    if isinstance(error, ray.exceptions.RayActorError | DeploymentUnavailableError):
        return Unavailable("The model's replica was lost. Try again.", retry_after=2)
    logger.exception("unexpected failure of a replica call", exc_info=error)
    return ModelError(f"The model's replica failed: {last_line(error)}")
