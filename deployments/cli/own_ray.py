"""A private Ray: it listens only on this machine and requires a token.

Ray reads its settings from the environment, most of them when it is imported, and its processes inherit them. So they
are set before `ray` is imported, and whoever talks to this Ray from another shell needs them too: they are in a file.
https://docs.ray.io/en/latest/ray-security/token-auth.html
"""

from __future__ import annotations

import atexit
import os
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

OWN = "local"
"""The address for which Ray starts a node of its own."""

TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
"""The variable of the file with the token: its value is the mark of this Ray's processes."""

SETTINGS = "ray.env"
"""The file that other shells `source` to reach this Ray."""

_PREFIX = "troupe-"
_PROXY_MIDDLEWARES = "deployments.proxy:middlewares"


def own_ray_environment(folder: Path) -> dict[str, str]:
    """Settings of a Ray that listens on 127.0.0.1 and requires a fresh token, which is in a file of mode 0600.

    Args:
        folder: one that only this user can enter.
    """
    token = folder / "token"
    with open(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        TOKEN_PATH: str(token),
        # Without it Ray takes the address that other machines reach this one by, also where 127.0.0.1 is asked for.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Seconds until a replica that finds no room is one that never will: no node joins this Ray.
        "RAY_SERVE_SLOW_STARTUP_WARNING_S": "15",
        "RAY_SERVE_SLOW_STARTUP_WARNING_PERIOD_S": "15",
    }


def use_own_ray() -> Path:
    """Prepare this process to start a private Ray. The folder of its token is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    owner = os.getpid()
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update(own_ray_environment(folder))
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", _PROXY_MIDDLEWARES)
    # Streams take less of the proxy and the ingress than as objects of Ray.
    os.environ.setdefault("RAY_SERVE_PROXY_USE_GRPC", "1")
    # Ray's own default lets every other process go first, such as a benchmark that waits for the answers.
    os.environ.setdefault("RAY_worker_niceness", "0")
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def write_settings(folder: Path, addresses: Mapping[str, str]) -> Path:
    """Write a file for other shells: after `source FILE`, `ray status` and `serve status` work. Removed at the end.

    Args:
        folder: where it goes.
        addresses: variables that say where it is.
    """
    names = ("RAY_AUTH_MODE", TOKEN_PATH, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    settings = {name: os.environ[name] for name in names} | dict(addresses)
    file = folder / SETTINGS
    file.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items()))
    atexit.register(_remove, file, os.getpid())
    return file


def _remove(file: Path, owner: int) -> None:
    if os.getpid() == owner:
        file.unlink(missing_ok=True)
