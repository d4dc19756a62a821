"""The folder of a run's logs. It outlives the run; the oldest folders are removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.logs import LOG_FOLDER

SERVER_LOG = "server.log"
_KEPT = 20
_PLACE = "troupe/logs"


def new_log_folder() -> Path:
    """A new folder for this process, which `LOG_FOLDER` names from now on in its environment.

    It is in `TROUPE_LOGS`, or in `troupe/logs` of `XDG_STATE_HOME` (by default ~/.local/state). There the newest 20
    folders are kept, and those of processes that still run.
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    base = _base()
    try:
        folder = base / name
        folder.mkdir(mode=0o700, parents=True)
        _prune(base)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix=f"troupe-logs-{name}-"))
    os.environ[LOG_FOLDER] = str(folder)
    return folder


def with_logs(config: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Serve configuration whose processes write to a folder, and the logging of Serve's own processes.

    Serve's line for each request is off: the ingress writes one with the model and its tokens. What the configuration
    says of logging stays.
    """
    logging = {"logs_dir": str(folder / "serve"), "enable_access_log": False}
    applications = [
        app | ({"logging_config": logging | app["logging_config"]} if app.get("logging_config") else {})
        for app in config["applications"]
    ]
    every = logging | (config.get("logging_config") or {})
    return {**config, "logging_config": every, "applications": applications}, every


def link_session(folder: Path, session: Path) -> None:
    """Let `ray` in the folder lead to Ray's own logs: those of its processes that crash."""
    with contextlib.suppress(OSError):
        (folder / "ray").symlink_to(session / "logs")


def _base() -> Path:
    given = os.environ.get("TROUPE_LOGS")
    if given:
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / _PLACE


def _prune(base: Path) -> None:
    folders = sorted(path for path in base.glob("????????-??????-*") if path.is_dir())
    for folder in folders[:-_KEPT]:
        if not Path("/proc", folder.name.rpartition("-")[2]).exists():
            shutil.rmtree(folder, ignore_errors=True)
