"""`serve run` that ends well: on SIGTERM new requests are refused, those that run end, then all stops.

python -m deployments.drain serve_config.yaml

`serve run` itself ends its own Ray at once on SIGTERM, and every answer with it. Ctrl-C, a second SIGTERM and a Ray
cluster that somebody else started (RAY_ADDRESS) are left to it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import ray
from ray import serve
from ray.serve.scripts import cli

GRACE_S = 60.0
_ANSWER_S = 5.0
_LAST_BYTES_S = 0.5


def main() -> None:
    """Command line; see the module's docstring."""
    try:
        cli(["run", *sys.argv[1:]])
    except SystemExit as end:
        if end.code == signal.SIGTERM and not os.environ.get("RAY_ADDRESS") and ray.is_initialized():
            signal.alarm(0)  # Ray's own handler has set one, to end this process three seconds after the signal
            print(f"SIGTERM: ending what runs, for at most {GRACE_S:g} s; a second one ends at once.", flush=True)
            _drain_while_ray_answers()
        raise


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
    return [
        answer
        for response in [handle.broadcast(method, *arguments) for handle in handles]
        for answer in response.results(timeout_s=_ANSWER_S, return_exceptions=True)
    ]


def _is_busy(status: Any) -> bool:
    """Whether a replica computes, or somebody waits for a model there. One that does not answer does neither."""
    return isinstance(status, dict) and bool(status["waiting"] or any(model["in_use"] for model in status["models"]))


if __name__ == "__main__":
    main()
