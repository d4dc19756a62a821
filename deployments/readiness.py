"""Why a deployment does not answer: what it waits for, by Ray Serve's own account, or what went wrong on the way."""

from __future__ import annotations

import asyncio
import logging
import time

import ray.exceptions
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import ApplicationStatus, DeploymentStatus, DeploymentStatusOverview, ReplicaState, ServeStatus

from deployments.core.errors import ModelError, Overloaded, ReplicaLost, TroupeError, Unavailable, last_line
from deployments.ray_internals import unscheduled

logger = logging.getLogger("ray.serve")

RETRY_S = 5
_KEPT_S = 1.0
_LIMIT_S = 5.0


class Waiting:
    """Asks Serve's controller what deployments wait for; its answer serves all who ask within a second."""

    def __init__(self) -> None:
        self._asked = float("-inf")
        self._status: asyncio.Future[ServeStatus] | None = None

    async def error(self, app: str, deployment: str) -> Unavailable | None:
        """What requests for a deployment are to be answered, which has no replica; None if it starts one for them.

        Args:
            app: the application's name.
            deployment: one without a replica, as far as the caller knows.
        """
        try:
            reason = _reason(await self._now(), app, deployment)
        except Exception as error:  # the controller is being restarted, or answers late
            reason = f"Ray Serve's controller does not answer ({last_line(error)})"
        if reason is None:
            return None
        return _unavailable(app, f"deployment {deployment!r} has no replica: {reason}")

    async def deploying(self) -> Unavailable | None:
        """What is to be answered under a path that no application has yet; None if none is being deployed."""
        try:
            status = await self._now()
        except Exception:
            return None
        names = [name for name, app in status.applications.items() if app.status == ApplicationStatus.DEPLOYING]
        return _unavailable(names[0], "it is being deployed") if names else None

    async def _now(self) -> ServeStatus:
        if self._status is None or time.monotonic() - self._asked > _KEPT_S:
            self._asked = time.monotonic()
            self._status = asyncio.ensure_future(asyncio.wait_for(asyncio.to_thread(serve.status), _LIMIT_S))
        return await asyncio.shield(self._status)


def _unavailable(app: str, why: str) -> Unavailable:
    return Unavailable(f"Application {app!r} cannot answer yet: {why}. Try again.", retry_after=RETRY_S)


def _reason(status: ServeStatus, app: str, deployment: str) -> str | None:
    """Why a deployment has no replica; None if it has one, or if none is wanted while nobody asks."""
    application = status.applications.get(app)
    if application is None:
        return "the application is being deployed"
    found = application.deployments.get(deployment)
    if found is None:
        return _last(application.message) or "it is being deployed"
    if found.replica_states.get(ReplicaState.RUNNING) or found.status == DeploymentStatus.HEALTHY:
        return None
    return unscheduled(found.message) or _last(found.message) or _starting(found)


def _starting(found: DeploymentStatusOverview) -> str:
    states = {ReplicaState(state).value.lower(): count for state, count in found.replica_states.items() if count}
    return f"its replicas start ({', '.join(f'{count} {state}' for state, count in states.items()) or 'none yet'})"


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300].rstrip(".") if lines else ""


def as_troupe_error(error: Exception) -> TroupeError:
    """The error that a client gets for a failure on the way to a replica or in it."""
    cause = getattr(error, "cause", None)
    if isinstance(error, TroupeError):
        return error
    if isinstance(cause, TroupeError):
        return cause
    if isinstance(error, BackPressureError):
        return Overloaded("The request queue is full. Try again soon.", retry_after=5)
    if isinstance(error, DeploymentUnavailableError):
        return Unavailable("The model's replicas are not there now. Try again.", retry_after=2)
    if isinstance(error, ray.exceptions.RayActorError):
        return ReplicaLost("The model's replica was lost. Try again.", retry_after=2)
    logger.exception("unexpected failure of a replica call", exc_info=error)
    return ModelError(f"The model's replica failed: {last_line(error)}")
