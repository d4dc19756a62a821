"""The registry of an application as a deployment of one replica, and what the ingresses ask it with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.args import entry_faults
from deployments.config.app import AppArgs
from deployments.config.sources import Spec
from deployments.core.errors import TroupeError, Unavailable
from deployments.logs import enter_folder, log_like_serve
from deployments.ray_internals import keep_replica_port_local
from deployments.registry.registry import Changes, Registry

Handle: TypeAlias = DeploymentHandle[Any]

_LIMIT_S = 10.0


SINGLE: dict[str, Any] = {
    "num_replicas": 1,
    "max_ongoing_requests": 10_000,
    "health_check_period_s": 2,
    "graceful_shutdown_timeout_s": 1,  # what runs goes on with the next start, or waits for changes alone
    "ray_actor_options": {"num_cpus": 0},
    "logging_config": {"enable_access_log": False},
}
"""Options of a deployment that is one small process for all ingresses."""


@serve.deployment(name="ModelRegistry", **SINGLE)
class RegistryReplica:
    """`Registry` for all ingresses; what was added outlives it in its file."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        log_like_serve()
        enter_folder(args.folder)
        keep_replica_port_local()
        self._registry = Registry(args, entry_faults)
        self._searching = asyncio.create_task(self._registry.run())

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the registry answers."""
        return await getattr(self._registry, method)(*arguments)


class RegistryHandle:
    """A `ModelRegistry` over the handle of the deployment."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle.options(_by_reference=False)

    async def find(self, name: str) -> Spec | None:
        """See `ModelRegistry`."""
        return cast(Spec | None, await self._ask("find", name))

    async def changes(self, seen: str, limit: float) -> Changes:
        """See `ModelRegistry`."""
        return cast(Changes, await self._ask("changes", seen, limit, wait=limit))

    async def check(self, body: Mapping[str, Any]) -> Spec | None:
        """See `ModelRegistry`."""
        return cast(Spec | None, await self._ask("check", dict(body)))

    async def add(self, body: Mapping[str, Any]) -> tuple[Spec, bool]:
        """See `ModelRegistry`."""
        return cast(tuple[Spec, bool], await self._ask("add", dict(body)))

    async def remove(self, name: str) -> Spec:
        """See `ModelRegistry`."""
        return cast(Spec, await self._ask("remove", name))

    async def refresh(self) -> None:
        """See `ModelRegistry`."""
        await self._ask("refresh")

    async def states(self) -> list[dict[str, Any]]:
        """See `ModelRegistry`."""
        return cast(list[dict[str, Any]], await self._ask("states"))

    async def _ask(self, method: str, *arguments: Any, wait: float = 0.0) -> Any:
        return await ask_single(self._handle, "The registry of models", method, *arguments, limit=_LIMIT_S + wait)


async def ask_single(handle: Handle, name: str, method: str, *arguments: Any, limit: float) -> Any:
    """What a deployment of one replica answers that is asked by the name of a method.

    Args:
        name: of the deployment, for the message.
        limit: seconds.

    Raises:
        Unavailable: it does not answer.
        TroupeError: as the deployment raises it.
    """
    answer = handle.options(method_name="ask").remote(method, *arguments)
    try:
        return await asyncio.wait_for(answer, limit)
    except TroupeError:
        raise
    except (RayActorError, RayServeException, BackPressureError, TimeoutError) as error:
        answer.cancel()
        raise Unavailable(f"{name} does not answer; try again.", retry_after=2) from error
    except RayTaskError as error:
        if isinstance(error.cause, TroupeError):
            raise error.cause from None
        raise
