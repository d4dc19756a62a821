"""The same API in one process, without Ray: for a debugger, a notebook, a first try of a loader.

python -m deployments.local --loader path/to/my_model.py:load_model
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI

from deployments.args import read_args
from deployments.compat.legacy import add_legacy_routes
from deployments.config.app import AppArgs
from deployments.core.errors import ConfigError, TroupeError
from deployments.host.host import ModelHost, default_device
from deployments.openai.app import build_api
from deployments.registry.registry import Registry
from model_loaders.contract import ModelInfo, as_model_info
from model_loaders.resolve import load_model_info

KEEP_ALIVE_S = 90
"""How long an idle connection stays open, as in Ray Serve: longer than clients keep one for their next request."""

Source = ModelInfo | Mapping[str, Any] | str


def make_app(
    args: Mapping[str, Any] | AppArgs, *, given: Mapping[str, ModelInfo] | None = None, device: str | None = None
) -> FastAPI:
    """The API over models of this process.

    Args:
        args: what stands under `args` in serve_config.yaml.
        given: models that are loaded already, by id; their entry's loader is not called.
        device: where loaders put their models.

    Raises:
        ConfigError: the arguments are wrong.
    """
    checked = read_args(args)
    registry = Registry(checked) if checked.has_registry else None
    models = ModelHost(checked, device, given=given, registry=registry)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        searching = None if registry is None else asyncio.create_task(registry.run())
        if models.following is not None:
            models.following.start()
        await models.preload()
        yield
        if searching is not None:
            searching.cancel()
        await models.close()

    app = build_api(models, checked.api, more=add_legacy_routes)
    app.router.lifespan_context = lifespan
    return app


def model_app(
    model_info_from: Source | None = None,
    *,
    device: str | None = None,
    server: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **entry: Any,
) -> FastAPI:
    """The API over one model, loaded before this returns.

    Args:
        model_info_from: a loaded model (a `ModelInfo` or a dict of its fields), or the name of a loader
            (`module:function`, `path.py:function`, or `path.py` with a module-level `model_info`); None or
            "entrypoint" reads the name from the environment variable ENTRYPOINT, by default model_entrypoint.py.
        device: where the loader puts the model; None reads the environment variable DEVICE.
        server: options of the API as a whole, the `api` section of serve_config.yaml's args. With the environment
            variable SAVE=true its `record_dir` is REQUEST_SAVE_DIR, by default out/requests.
        kwargs: arguments of the loader.
        entry: further fields of the model's entry in serve_config.yaml (`id`, `aliases`, `engine`, `api`, …). Without
            an `id` clients find the model under its `model_name`, and as `model`.

    Raises:
        ModelLoadFailed: the loader failed, or gives no model.
        ConfigError: a field or option is wrong.
    """
    source = model_info_from
    if source is None or source == "entrypoint":
        source = os.environ.get("ENTRYPOINT", "model_entrypoint.py")
    device = device or os.environ.get("DEVICE") or default_device()
    if isinstance(source, str):
        info = load_model_info(source, kwargs or {}, device)
    else:
        info = as_model_info(source, "given to run_app")
    names = {"id": info.model_name or "model", "aliases": ["model"] if info.model_name not in ("", "model") else []}
    model = {**({} if "id" in entry else names), "loader": "given", "pinned": True, **entry}
    return make_app(
        {"models": [model], "api": {**_saving(), **(server or {})}}, given={model["id"]: info}, device=device
    )


def _saving() -> dict[str, str]:
    if os.environ.get("SAVE", "").lower() not in ("1", "true", "yes"):
        return {}
    return {"record_dir": os.environ.get("REQUEST_SAVE_DIR", "out/requests")}


def run_app(
    model_info_from: Source | None = None, *, host: str = "127.0.0.1", port: int = 8000, **options: Any
) -> None:
    """Serve one model until interrupted, in a notebook too; `options` as for `model_app`.

    Raises:
        ConfigError: the port is taken, which is found before the model is loaded, or as for `model_app`.
        ModelLoadFailed: as for `model_app`.
    """
    _try_port(host, port)
    level = os.environ.get("LOGLEVEL", "INFO").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    app = model_app(model_info_from, **options)
    server = uvicorn.Server(
        uvicorn.Config(app, host=host, port=port, log_level=level.lower(), timeout_keep_alive=KEEP_ALIVE_S)
    )
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        server.run()
        return
    # A notebook's cell runs inside an event loop, where no other can run.
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        server.should_exit = True
        thread.join()


def _try_port(host: str, port: int) -> None:
    """Refuse an address that nobody can listen on now: a model can take minutes to load."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot listen on {host}, port {port}: {reason}. Choose another host or port.") from None


def main() -> None:
    """Command line of `python -m deployments.local`."""
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=__doc__)
    parser.add_argument("--loader", help="module:function, path.py:function or path.py; default: $ENTRYPOINT")
    parser.add_argument("--kwargs", default="{}", help="the loader's keyword arguments, as YAML or JSON")
    parser.add_argument("--id", help="the name clients send as `model`; default: the model's own, and `model`")
    parser.add_argument("--device", help="such as cuda:0; default: $DEVICE, else the first GPU, else cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    named = {"id": given.id} if given.id else {}
    try:
        run_app(
            given.loader,
            host=given.host,
            port=given.port,
            kwargs=yaml.safe_load(given.kwargs),
            device=given.device,
            **named,
        )
    except (ConfigError, TroupeError) as error:
        sys.exit(f"troupe: {error}")


if __name__ == "__main__":
    main()
