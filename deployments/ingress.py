"""The OpenAI API on CPU, without torch, which forwards calls to the model replicas: over HTTP, and for batches."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve

from deployments.batches.client import BatchClient
from deployments.batches.service import Batches
from deployments.compat.legacy import add_legacy_routes
from deployments.config.app import AppArgs
from deployments.handle_client import Handle, HandleClient
from deployments.logs import enter_folder, log_like_serve, write_access_log
from deployments.model_registry import SINGLE, ask_single
from deployments.openai.app import build_api
from deployments.openai.batches.compute import LineComputer
from deployments.openai.http.middleware import ACCESS
from deployments.ray_internals import keep_replica_port_local, name_receiver

_LIMIT_S = 30.0


@serve.deployment(
    name="OpenAIIngress",
    max_ongoing_requests=10_000,
    graceful_shutdown_timeout_s=60,
    ray_actor_options={"num_cpus": 0},  # two replicas on the CPU fit on two cores
)
@serve.ingress()
class OpenAIIngress:
    """Serves the OpenAI routes.

    Args:
        args: the application's configuration.
        pools: a handle of each deployment of model replicas, by the pool's name.
        registry: a handle of the registry, if models can come while the server runs.
        batches: a handle of `BatchOwner`, if there is one.
    """

    def __init__(
        self, args: AppArgs, pools: dict[str, Handle], registry: Handle | None = None, batches: Handle | None = None
    ) -> None:
        log_like_serve()
        write_access_log(ACCESS)
        enter_folder(args.folder)
        keep_replica_port_local()
        name_receiver()
        self._args = args
        self._client = HandleClient(args, pools, registry)
        self._batches = None if batches is None else _batch_client(batches)

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve adds x-request-id itself.
        app = build_api(
            self._client, self._args.api, names_requests=False, more=add_legacy_routes, batches=self._batches
        )
        app.router.add_event_handler("startup", self._client.start)
        return app


def _batch_client(handle: Handle) -> BatchClient:
    by_value = handle.options(_by_reference=False)
    return BatchClient(partial(ask_single, by_value, "The process of files and batches", limit=_LIMIT_S))


@serve.deployment(name="BatchOwner", **SINGLE)
class BatchOwner:
    """Files and batches for all ingresses, and the API whose routes compute the lines. See `OpenAIIngress`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: AppArgs, pools: dict[str, Handle], registry: Handle | None = None
    ) -> None:
        log_like_serve()
        write_access_log(ACCESS)
        enter_folder(args.folder)
        keep_replica_port_local()
        client, computer = HandleClient(args, pools, registry), LineComputer()
        computer.app = build_api(client, args.api)
        client.start()
        self._batches = Batches(args, client, computer)
        self._running = asyncio.create_task(self._batches.run())

    async def ask(self, method: str, *arguments: Any) -> Any:
        """See `Batches.ask`."""
        return await self._batches.ask(method, *arguments)

    async def check_health(self) -> None:
        """Raise if the batches have stopped, so that Serve replaces this replica."""
        if self._running.done():
            self._running.result()

    async def __del__(self) -> None:
        running = getattr(self, "_running", None)
        if running is not None:
            running.cancel()
            await asyncio.wait([running])
