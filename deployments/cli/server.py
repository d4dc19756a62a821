"""The server of `scripts/serve`: runs the applications of a configuration on Ray Serve.

It differs from `serve run`, which joins the Ray that the last `ray start` on this machine has left (here
that needs RAY_ADDRESS), does not report that a deployment has failed, and ends every answer at once on SIGTERM.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from deployments.cli.own_ray import OWN
from deployments.core.errors import ConfigError
from deployments.ray_internals import deploy, unreachable, unscheduled

GRACE_S = 60.0
_ANSWER_S = 5.0
_LAST_BYTES_S = 0.5


class DeployFailed(RuntimeError):
    """An application of the configuration cannot run; the message is the reason."""


class _Terminated(BaseException):
    """SIGTERM has come."""


def run(config: dict[str, Any], address: str, ready: Callable[[], None]) -> int:
    """Serve a configuration until a signal ends it, and return the exit status.

    On SIGTERM new requests are refused, those that run end, all stops; Ctrl-C and a second SIGTERM end at once.

    Args:
        config: a Ray Serve configuration, checked.
        address: "local" starts a Ray; anything else is the address of one that runs, which is left running.
        ready: called once every application runs.

    Raises:
        ConfigError: `ready` finds the configuration wrong.
    """
    if address != OWN and (fault := unreachable(address, _ANSWER_S)):
        print(f"troupe: RAY_ADDRESS={address}, but {fault}", file=sys.stderr)
        return 1
    ray.init(address=address, namespace="serve")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        deploy(config)
        _wait_until_running([app["name"] for app in config["applications"]], fixed=address == OWN)
        ready()
        threading.Event().wait()
    except DeployFailed as failure:
        print(f"troupe: {failure}", file=sys.stderr)
        _shut_down(address)
        return 1
    except ConfigError:
        _shut_down(address)
        raise
    except KeyboardInterrupt:
        _shut_down(address)
        return 130
    except _Terminated:
        signal.signal(signal.SIGTERM, _terminate_now)
        if address == OWN:
            print(
                f"SIGTERM: finishing running requests, for at most {GRACE_S:g} s; a second one stops at once.",
                flush=True,
            )
            _drain_while_ray_answers()
        return 128 + signal.SIGTERM
    return 0


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _terminate_now(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(128 + signal.SIGTERM)


def _shut_down(address: str) -> None:
    if address == OWN:
        serve.shutdown()


def _wait_until_running(names: list[str], *, fixed: bool) -> None:
    """Wait for every application.

    Args:
        fixed: no node will join this Ray, so what does not fit now never will.

    Raises:
        DeployFailed: one of them failed, or asks for more than there is.
    """
    while True:
        states = {name: state for name, state in serve.status().applications.items() if name in names}
        for name, state in states.items():
            if state.status == ApplicationStatus.DEPLOY_FAILED:
                raise DeployFailed(f"Application {name!r} cannot be deployed: {_reason(state)}")
            if fixed and (lacking := _lacking(state)):
                raise DeployFailed(f"Application {name!r} cannot be deployed: {lacking}")
        if len(states) == len(names) and all(s.status == ApplicationStatus.RUNNING for s in states.values()):
            return
        time.sleep(0.2)


def _reason(state: ApplicationStatusOverview) -> str:
    """The last line of each text that says why; Ray's tracebacks are in its log."""
    texts = [state.message, *(deployment.message for deployment in state.deployments.values())]
    lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    return "; ".join(dict.fromkeys(found[-1] for found in lines if found)) or "see Ray's log"


def _lacking(state: ApplicationStatusOverview) -> str | None:
    """Which deployment asks for more than this machine has."""
    for name, deployment in state.deployments.items():
        if waiting := unscheduled(deployment.message):
            return (
                f"deployment {name!r} does not fit on this machine: {waiting}. Lower num_replicas, or "
                "ray_actor_options.num_cpus or num_gpus."
            )
    return None


def _drain_while_ray_answers() -> None:
    """Drain in a thread, because a Ray that got the same signal may not answer for minutes."""
    reached = threading.Event()
    draining = threading.Thread(target=drain, args=(GRACE_S, reached), daemon=True)
    draining.start()
    if reached.wait(_ANSWER_S):
        draining.join(2 * GRACE_S)


def drain(limit: float, reached: threading.Event) -> None:
    """Let every Troupe application on this Ray finish its running requests, then stop Ray Serve.

    Args:
        limit: seconds that requests have to end.
        reached: set once new requests are refused.
    """
    replicas = [
        serve.get_deployment_handle(name, app)
        for app, status in serve.status().applications.items()
        for name in status.deployments
        if name.startswith("ModelReplica")
    ]
    _tell(replicas, "drain", True)
    reached.set()
    end = time.monotonic() + limit
    while time.monotonic() < end and any(_is_busy(status) for status in _tell(replicas, "status")):
        time.sleep(0.1)
    time.sleep(_LAST_BYTES_S)
    serve.shutdown()


def _tell(handles: list[Any], method: str, *arguments: Any) -> list[Any]:
    """What the replicas of some deployments answer. A deployment that has none now answers nothing."""
    answers: list[Any] = []
    for response in [handle.broadcast(method, *arguments) for handle in handles]:
        with contextlib.suppress(DeploymentUnavailableError, TimeoutError):
            answers += response.results(timeout_s=_ANSWER_S, return_exceptions=True)
    return answers


def _is_busy(status: Any) -> bool:
    """Whether a replica computes, or somebody waits for a model there. One that does not answer does neither."""
    return isinstance(status, dict) and bool(status["waiting"] or any(model["in_use"] for model in status["models"]))
