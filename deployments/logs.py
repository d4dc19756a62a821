"""Log lines of ours in Ray Serve's files and format, each with the id of the request it belongs to."""

from __future__ import annotations

import logging
import os
import sys

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
