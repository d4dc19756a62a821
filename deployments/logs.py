"""Log lines of ours in Ray Serve's files and format, each with the id of the request it belongs to."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path

LOG_FOLDER = "TROUPE_LOG_FOLDER"
"""The variable of the folder that `troupe serve` has made for this run's logs."""

_ACCESS_BYTES = 128 * 2**20

_SERVE = "ray.serve"
_OURS = ("troupe", "deployments", "model_loaders")


def log_like_serve() -> None:
    """Let our loggers write where Ray Serve's does, as text or JSON as its configuration says.

    Serve's handlers add the request's id, the client's `x-request-id` where it sent one, to what is logged while a
    request is served; lines of an engine's thread name the call's id, which the line at the end of the call has too.
    """
    serve = logging.getLogger(_SERVE)
    for name in _OURS:
        ours = logging.getLogger(name)
        ours.handlers = serve.handlers
        ours.setLevel(serve.level or logging.INFO)
        ours.propagate = False


def enter_folder(folder: str | None) -> None:
    """Let relative paths of this process begin in a folder, and let modules beside the configuration be found there."""
    if folder is None:
        return
    if not os.path.isdir(folder):
        logging.getLogger("ray.serve").warning(
            "%s is not on this node; relative paths start from %s", folder, os.getcwd()
        )
        return
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.append(folder)


def write_access_log(access: logging.Logger) -> None:
    """Let a logger write to requests.log in the log folder of `troupe serve`; without such a folder, do nothing."""
    folder = Path(os.environ.get(LOG_FOLDER, ""))
    if not os.environ.get(LOG_FOLDER) or not folder.is_dir():
        return
    file = logging.handlers.RotatingFileHandler(folder / "requests.log", maxBytes=_ACCESS_BYTES, backupCount=3)
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    access.handlers = [file]
    access.propagate = False
    access.setLevel(logging.INFO)
