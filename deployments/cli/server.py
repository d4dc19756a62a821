"""The server of `troupe serve`: runs the applications of a configuration on Ray Serve.

It differs from `serve run`, which joins the Ray that the last `ray start` on this machine has left (here
that needs RAY_ADDRESS), does not report that a deployment has failed, and ends every answer at once on a signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatus

from deployments.cli.output.terminal import Terminal
from deployments.cli.own_ray import OWN
from deployments.cli.serve_file import troupe_applications
from deployments.config.app import AppArgs, parse_args
from deployments.core.errors import ConfigError
from deployments.logs import LOG_FOLDER
from deployments.ray_internals import deploy, outside_handle, unreachable, unscheduled

GRACE_S = 60.0
_ANSWER_S = 5.0
_LAST_BYTES_S = 0.5
_POLL_S = 0.1


class DeployFailed(RuntimeError):
    """An application of the configuration cannot run; the message is the reason."""


class _Stopped(BaseException):
    """A signal has come."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Server:
    """The applications of a configuration.

    Args:
        config: a Ray Serve configuration, checked.
        address: "local" starts a Ray; anything else is the address of one that runs, which is left running.
    """

    def __init__(self, config: dict[str, Any], address: str, terminal: Terminal) -> None:
        self._config = config
        self._own = address == OWN
        self._address = address
        self._terminal = terminal

    def run(
        self, started: Callable[[], None], ready: Callable[[], None], logging: Mapping[str, Any] | None = None
    ) -> int:
        """Serve until a signal ends it, and return the exit status.

        On SIGINT and SIGTERM new requests are refused, those that run end, all stops; a second signal ends at once.

        Args:
            started: called once Ray runs.
            ready: called once every application runs, and every pinned model is loaded.
            logging: a `logging_config` for Serve's own processes.

        Raises:
            ConfigError: this machine lacks GPUs that the configuration asks for, or `ready` finds it wrong.
        """
        if not self._own and (fault := unreachable(self._address, _ANSWER_S)):
            self._terminal.complain(f"RAY_ADDRESS={self._address}, but {fault}")
            return 1
        _on_signals(_stop)
        try:
            self._start(started, logging)
            ready()
            threading.Event().wait()
        except DeployFailed as failure:
            self._terminal.complain(f"{str(failure).rstrip('.')}. The logs are in {os.environ[LOG_FOLDER]}.")
            self._shut_down()
            return 1
        except ConfigError:
            self._shut_down()
            raise
        except _Stopped as stopped:
            self._stop(stopped.number)
            return 128 + stopped.number
        return 0

    def _start(self, started: Callable[[], None], logging: Mapping[str, Any] | None) -> None:
        with self._terminal.stage("Ray") as stage:
            ray.init(address=self._address, namespace="serve", log_to_driver=not self._terminal.redirected)
            _on_signals(_stop)  # Ray has set handlers of its own
            resources = ray.cluster_resources()
            cpus, gpus = (int(resources.get(name, 0)) for name in ("CPU", "GPU"))
            stage.result = f"{cpus} CPUs, {gpus or 'no'} GPU{'s' * (gpus > 1)}"
            started()
        if self._own:
            _check_gpus(self._config, gpus)
        with self._terminal.stage("application") as stage:
            deploy(self._config, logging)
            names = [app["name"] for app in self._config["applications"]]
            _wait_until_running(names, fixed=self._own)
            stage.result = f"{', '.join(names)} runs"
        self._load_pinned()

    def _stop(self, number: int) -> None:
        """Finish what runs. A second signal ends the process at once."""
        _on_signals(_stop_now)
        name = signal.Signals(number).name
        if not self._own:
            self._terminal.say(f"{name}: this command ends; the applications stay on the Ray at {self._address}.")
        elif not ray.is_initialized():
            self._terminal.say(f"{name}: stopping.")
        else:
            self._terminal.say(
                f"{name}: finishing running requests, for at most {GRACE_S:g} s; a second signal stops at once."
            )
            _drain_while_ray_answers()

    def _shut_down(self) -> None:
        if self._own:
            serve.shutdown()

    def _load_pinned(self) -> None:
        """Wait for the pinned models of every application, each with a line.

        Raises:
            DeployFailed: none of the models can be loaded.
        """
        for app in troupe_applications(self._config):
            args = parse_args(app.get("args") or {})
            failures = [
                failure
                for name, pool in args.all_pools().items()
                for entry in args.of_pool(pool).models
                if entry.pinned and (failure := self._wait_for(entry.id, app["name"], _deployment(args, name)))
            ]
            if len(failures) == sum(entry.base is None for entry in args.models):
                raise DeployFailed(" ".join(failures))
            for failure in failures:
                self._terminal.complain(failure)

    def _wait_for(self, model: str, app: str, deployment: str) -> str | None:
        """Why a model cannot be loaded; None once every replica of its deployment has loaded it."""
        replicas = [outside_handle(deployment, app)]
        with self._terminal.stage("model") as stage:
            while True:
                statuses = [status for status in _tell(replicas, "status") if isinstance(status, dict)]
                failures = [status["failed"][model] for status in statuses if model in status["failed"]]
                if not failures and _has_lost_a_replica(app, deployment):
                    failures = [f"Model {model!r}: a replica has died while it loaded the model."]
                if failures:
                    stage.result = f"{model} cannot be loaded"
                    return str(failures[0])
                if statuses and all(model in [loaded["id"] for loaded in status["models"]] for status in statuses):
                    stage.result = f"{model} is loaded"
                    return None
                stage.show(min((status["loaded_parts"].get(model, 0.0) for status in statuses), default=0.0))
                time.sleep(_POLL_S)


def _deployment(args: AppArgs, pool: str) -> str:
    return f"ModelReplica-{pool}" if args.pools else "ModelReplica"


def _has_lost_a_replica(app: str, deployment: str) -> bool:
    status = serve.status().applications[app].deployments[deployment].status
    return bool(status == DeploymentStatus.UNHEALTHY)


def _check_gpus(config: Mapping[str, Any], available: int) -> None:
    """Refuse a configuration whose replicas ask for more GPUs than there are."""
    wanted = 0.0
    for app in troupe_applications(config):
        pools = (app.get("args") or {}).get("pools") or {}
        gpus = {
            f"ModelReplica-{name}": (pool.get("gpus_per_replica") or 0) * (pool.get("replicas") or 1)
            for name, pool in pools.items()
        }
        for deployment in app.get("deployments") or []:
            each = (deployment.get("ray_actor_options") or {}).get("num_gpus")
            count = deployment.get("num_replicas") or 1
            if each is not None:
                gpus[deployment["name"]] = each * (count if isinstance(count, int) else 1)
        wanted += sum(gpus.values())
    if wanted > available:
        raise ConfigError(
            f"the replicas ask for {wanted:g} GPUs, and this machine has {available or 'none'}. Lower num_replicas or "
            "num_gpus (--replicas, --gpus); 0 GPUs is the CPU."
        )


def _on_signals(handler: Any) -> None:
    """Handle SIGINT and SIGTERM, also if a shell has started this in the background and lets SIGINT be ignored.

    The end of the terminal counts too, unless `nohup` lets it be ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _stop(number: int, _: object) -> NoReturn:
    raise _Stopped(number)


def _stop_now(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


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
    """The last line of each text that says why; Ray's tracebacks are in the controller's log."""
    texts = [state.message, *(deployment.message for deployment in state.deployments.values())]
    lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    return "; ".join(dict.fromkeys(found[-1] for found in lines if found)) or "see the controller's log"


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
        outside_handle(name, app)
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
