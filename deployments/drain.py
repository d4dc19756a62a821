"""`serve run` on a Ray of its own that ends well: on SIGTERM new requests are refused, those that run end, all stops.

python -m deployments.drain serve_config.yaml

`serve run` itself joins the Ray that the last `ray start` on this machine has left, another project's or a dead one;
here that takes RAY_ADDRESS. It also ends its own Ray at once on SIGTERM, and every answer with it. Ctrl-C, a second
SIGTERM and a Ray that somebody else started are left to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import ray
from ray import serve
from ray._private.services import canonicalize_bootstrap_address
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.scripts import cli

GRACE_S = 60.0
_OWN = "local"
_ANSWER_S = 5.0
_LAST_BYTES_S = 0.5


def main() -> None:
    """Command line; see the module's docstring."""
    address = os.environ.get("RAY_ADDRESS") or _OWN
    if fault := _unreachable(address):
        sys.exit(f"troupe: {fault}")
    try:
        cli(["run", "--address", address, *sys.argv[1:]])
    except SystemExit as end:
        if end.code == signal.SIGTERM and address == _OWN and ray.is_initialized():
            signal.alarm(0)  # Ray's own handler has set one, to end this process three seconds after the signal
            print(f"SIGTERM: ending what runs, for at most {GRACE_S:g} s; a second one ends at once.", flush=True)
            _drain_while_ray_answers()
        raise


def _unreachable(address: str) -> str | None:
    """Why nobody can join the Ray at an address; Ray itself would try for minutes before it says so."""
    if address == _OWN or "://" in address:
        return None
    place = address
    try:
        place = canonicalize_bootstrap_address(address) or address
        host, _, port = place.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError) as error:
        return (
            f"RAY_ADDRESS={address}, but no Ray answers at {place} ({error}). Start it with `ray start`, or unset "
            "RAY_ADDRESS to serve on a Ray of its own."
        )
    return None


def _drain_while_ray_answers() -> None:
    """Drain in a thread: a Ray that has got the same signal answers nothing, for minutes."""
    reached = threading.Event()
    draining = threading.Thread(target=drain, args=(GRACE_S, reached), daemon=True)
    draining.start()
    if reached.wait(_ANSWER_S):
        draining.join(2 * GRACE_S)


def drain(limit: float, reached: threading.Event) -> None:
    """Let every Troupe application on this Ray end what it computes, then stop Ray Serve.

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


if __name__ == "__main__":
    main()
