"""ModelReplica: one per GPU, holds the models and answers the ingress.

Imports torch only once it runs, so that the ingress and the builder stay light.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from ray import serve

from deployments.config import AppArgs
from deployments.messages import Event, GenerateCall, Prompt

if TYPE_CHECKING:
    from deployments.client import Rendered

_RAY_WRAPPER = "__serve_multiplex_wrapper"


@serve.deployment(
    name="ModelReplica",
    max_ongoing_requests=10_000,
    health_check_period_s=2,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=60,
)
class ModelReplica:
    """Answers calls for the configured models, loading and unloading them as they are asked for."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        from deployments.host import ModelHost

        _log_like_serve()
        _share_cores()
        self._host = ModelHost(args, on_gone=self._withdraw)
        self._preload = asyncio.create_task(self._load_pinned(args))

    async def _load_pinned(self, args: AppArgs) -> None:
        for entry in args.models:
            if entry.pinned:
                await self._advertise(entry.id)
        await self._host.preload()

    @serve.multiplexed(max_num_models_per_replica=-1)  # type: ignore[untyped-decorator]
    async def _advertise(self, model_id: str) -> str:
        """Tell the routers that this replica has the model. Which models stay is for the leases to decide."""
        return model_id

    def _withdraw(self, model_id: str) -> None:
        wrapper: Any = getattr(self, _RAY_WRAPPER, None)
        if wrapper is not None and wrapper.models.pop(model_id, None) is not None:
            wrapper._push_multiplexed_replica_info = True

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Event, None]:
        """The events of a call as they come."""
        await self._advertise(call.model)
        async with contextlib.aclosing(self._host.generate(call)) as events:
            async for event in events:
                yield event

    async def answer(self, call: GenerateCall) -> list[Event]:
        """The events of a call, all at once."""
        await self._advertise(call.model)
        async with contextlib.aclosing(self._host.generate(call)) as events:
            return [event async for event in events]

    async def render(self, model: str, prompt: Prompt) -> Rendered:
        """A prompt as the model would get it."""
        await self._advertise(model)
        return await self._host.render(model, prompt)

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        await self._advertise(model)
        return await self._host.detokenize(model, token_ids)

    async def tokenizer_info(self, model: str) -> dict[str, Any]:
        """What a client needs to know of the tokenizer."""
        await self._advertise(model)
        return await self._host.tokenizer_info(model)

    async def check_health(self) -> None:
        """Raise if an engine has died, so that Serve replaces this replica."""
        self._host.check()

    async def __del__(self) -> None:
        await self._host.close()


def _log_like_serve() -> None:
    """Let our loggers write where Ray Serve's does."""
    ours = logging.getLogger("troupe")
    ours.handlers = logging.getLogger("ray.serve").handlers
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _share_cores() -> None:
    """Give torch the cores of this replica: its num_cpus, or all cores where the replica is alone on the machine."""
    import torch

    cores = os.cpu_count() or 1
    replicas = getattr(serve.get_replica_context(), "world_size", 1) or 1
    torch.set_num_threads(max(1, cores // replicas))
