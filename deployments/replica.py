"""ModelReplica: one per GPU, holds the models and answers the ingress.

Imports torch only once it runs, so that the ingress and the builder stay light.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from typing import Any, ParamSpec, TypeVar

import ray
from ray import serve

from deployments.config.app import AppArgs
from deployments.config.sources import SPEC, Spec
from deployments.core.calls import Call
from deployments.core.cgroup import cores
from deployments.core.errors import TroupeError
from deployments.core.events import Event, Failed
from deployments.large_messages import Packed, packed_answer, unpacked
from deployments.logs import enter_folder, log_like_serve
from deployments.ray_internals import keep_replica_port_local

_RAY_WRAPPER = "__serve_multiplex_wrapper"
_REPORT_EVERY_S = 2.0
# In a second. A chunk takes a millisecond of processor time in the ingress and Serve's proxy: an eighth of the cores
# may go there, and an ingress can send little more than these.

P = ParamSpec("P")
T = TypeVar("T")


def errors_as_values(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T | Failed]]:
    """A method that returns an error for the client as `Failed`: Ray logs what is raised, with a traceback."""

    @functools.wraps(method)
    async def answered(*args: P.args, **kwargs: P.kwargs) -> T | Failed:
        try:
            return await method(*args, **kwargs)
        except TroupeError as error:
            return Failed(error)

    return answered


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
        from deployments.core.collector import leave_imports
        from deployments.engine.base.stream_pace import StreamPace
        from deployments.host.host import ModelHost
        from deployments.host.metrics.metrics import HostMetrics
        from deployments.metrics import RayMeters

        log_like_serve()
        enter_folder(args.folder)
        keep_replica_port_local()
        _share_cores()
        leave_imports()
        place = serve.get_replica_context().replica_id.unique_id
        pace = partial(StreamPace.of_replica, cores=_share(), replicas=_replicas())
        self._host = ModelHost(args, on_gone=self._withdraw, place=place, pace=pace)
        self._metrics = HostMetrics(RayMeters())
        self._tasks = [asyncio.create_task(self._preload(args)), asyncio.create_task(self._report())]

    async def _preload(self, args: AppArgs) -> None:
        for entry in args.models:
            if entry.pinned or entry.preload:
                await self._advertise(entry.base or entry.id)
        await self._host.preload()

    async def _report(self) -> None:
        while True:
            self._metrics.report(self._host.snapshot())
            await asyncio.sleep(_REPORT_EVERY_S)

    @serve.multiplexed(max_num_models_per_replica=-1)  # type: ignore[untyped-decorator]
    async def _advertise(self, model_id: str) -> str:
        """Tell the routers that this replica has the model. Which models stay is for the leases to decide."""
        return model_id

    def _withdraw(self, model_id: str) -> None:
        wrapper: Any = getattr(self, _RAY_WRAPPER, None)
        if wrapper is not None and wrapper.models.pop(model_id, None) is not None:
            wrapper._push_multiplexed_replica_info = True

    def _id(self, model: str) -> str:
        """The id of a model that is named by it, or by a `Spec` as JSON if it came while the server runs."""
        return self._host.admit(model) if model.startswith(SPEC) else model

    async def _admit(self, model: str) -> str:
        found = self._id(model)
        await self._advertise(self._host.place_of(found))
        return found

    async def generate(self, given: Call | Packed) -> AsyncGenerator[Event | Packed, None]:
        """The events of a call as they come."""
        async with contextlib.aclosing(self._events(given)) as events:
            async for event in events:
                yield await packed_answer(event)

    async def answer(self, given: Call | Packed) -> list[Event] | Packed:
        """The events of a call, all at once."""
        async with contextlib.aclosing(self._events(given)) as events:
            return await packed_answer([event async for event in events])  # type: ignore[no-any-return]

    async def _events(self, given: Call | Packed) -> AsyncGenerator[Event, None]:
        call: Call = await unpacked(given)
        if call.spec:
            self._host.admit(call.spec)
        await self._advertise(self._host.place_of(call.model))
        with self._metrics.observed(call) as seen:
            async with contextlib.aclosing(self._host.generate(call)) as events:
                async for event in events:
                    seen.add(event)
                    yield event

    @errors_as_values
    async def ask(self, method: str, model: str, *given: Any, **options: Any) -> Any:
        """What a method of `ModelHost` answers for one of its models."""
        model = await self._admit(model)
        arguments = [await unpacked(argument) for argument in given]
        return await packed_answer(await getattr(self._host, method)(model, *arguments, **options))

    @errors_as_values
    async def capture(self, method: str, *arguments: Any) -> Any:
        """A method of a `CaptureClient`, for the captures of this replica."""
        return await getattr(self._host.captures, method)(*arguments)

    @errors_as_values
    async def try_adapter(self, spec: str) -> None:
        """Compare an adapter with its base; `spec` as JSON."""
        found = Spec.model_validate_json(spec)
        await self._advertise(found.entry.base or found.entry.id)
        await self._host.try_adapter(found)

    async def unload(self, model: str) -> bool:
        """Unload a model once nobody uses it; False if it is not loaded."""
        return await self._host.unload(self._id(model))

    async def drain(self, on: bool) -> None:
        """Refuse new calls and end those that run; or take calls again."""
        await self._host.drain(on)

    async def status(self) -> dict[str, Any]:
        """What this replica is, holds and does, as JSON values."""
        context = serve.get_replica_context()
        return {
            "replica": context.replica_id.unique_id,
            "deployment": context.deployment,
            "node": ray.get_runtime_context().get_node_id()[:8],
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
            **self._host.snapshot(),
        }

    async def check_health(self) -> None:
        """Raise if an engine has died, so that Serve replaces this replica."""
        self._host.check()

    async def __del__(self) -> None:
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if hasattr(self, "_host"):
            await self._host.close()


def _replicas() -> int:
    return max(1, serve.get_replica_context().world_size or 1)


def _share() -> float:
    """An equal share of the machine's cores."""
    nodes = max(1, sum(bool(node["Alive"]) for node in ray.nodes()))
    return cores() / math.ceil(_replicas() / nodes)


def _share_cores() -> None:
    """Give torch this replica's part of the machine's cores: what it reserved, or an equal share if that is more."""
    import torch

    share = int(_share())
    reserved = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
    torch.set_num_threads(max(1, share, min(reserved, cores())))
