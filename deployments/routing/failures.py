"""What goes wrong on the way to a replica, as clients are told."""

from __future__ import annotations

import logging

import ray.exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.core.errors import ModelError, Overloaded, ReplicaLost, TroupeError, Unavailable, last_line

logger = logging.getLogger("ray.serve")


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
