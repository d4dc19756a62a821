"""The same API in one process, without Ray: for a debugger, a notebook, a first try of a loader.

python -m deployments.local --loader my_loader.py:load_model
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # the imports below take seconds
    signal.signal(signal.SIGINT, lambda *_: sys.exit("troupe: interrupted."))

import argparse
import asyncio
import atexit
import contextlib
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI

from deployments.args import check_adapter_folders, entry_faults, read_args
from deployments.batches.service import Batches
from deployments.compat.legacy import add_legacy_routes
from deployments.config.app import AppArgs
from deployments.config.yaml_text import read_yaml
from deployments.core.errors import ConfigError, ModelLoadFailed, TroupeError
from deployments.host.loading import default_device
from deployments.host.metrics.observed_host import ObservedHost
from deployments.openai.app import build_api
from deployments.openai.batches.compute import LineComputer
from deployments.registry.registry import Registry
from model_loaders.contract import ModelInfo, as_model_info
from model_loaders.resolve import load_model_info

KEEP_ALIVE_S = 90
"""How long an idle connection stays open, as in Ray Serve: longer than clients keep one for their next request."""

_PATIENCE_S = 5
_INFO = {each.name for each in fields(ModelInfo) if each.init}

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
    check_adapter_folders(checked, Path(checked.folder or ""))
    registry = Registry(checked, entry_faults) if checked.has_registry else None
    models = ObservedHost(checked, device, given=given, registry=registry)
    computer = LineComputer()
    batches = None if checked.batches_dir is None else Batches(checked, models, computer)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(registry.run())] if registry is not None else []
        if models.following is not None:
            models.following.start()
        await models.preload()
        tasks += [asyncio.create_task(batches.run())] if batches is not None else []
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await models.close()

    app = build_api(models, checked.api, more=add_legacy_routes, batches=None if batches is None else batches.client)
    computer.app = app
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
        info = as_model_info(source, "(a model of this program)")
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


class LocalServer:
    """A server beside a program, or in a notebook; it ends with `stop`, a `with` block or the program.

    Args:
        app: what it serves.
        listener: a socket that listens.
        api_key: what `client` sends.

    Attributes:
        url: without `/v1`.
    """

    def __init__(self, app: FastAPI, listener: socket.socket, api_key: str) -> None:
        host, port = listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._api_key = api_key
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=_PATIENCE_S,
            )
        )
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name=f"server-{port}", daemon=True)

    def start(self) -> None:
        """Returns when the API answers.

        Raises:
            ModelLoadFailed: the model cannot be served.
        """
        if not _RUNNING:
            _before_exit(stop_all)
        _RUNNING.add(self)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.02)
            if not self._thread.is_alive():
                raise ModelLoadFailed("The server has ended while it started; the log says why.")

    def client(self, **options: Any) -> Any:
        """An `openai.OpenAI` for this server; `options` as for that class.

        Raises:
            ConfigError: the package `openai` is not installed.
        """
        try:
            from openai import OpenAI
        except ImportError:
            raise ConfigError("client() needs the package openai: pip install openai.") from None
        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": self._api_key, **options})

    def stop(self) -> None:
        """End the server: running requests have a few seconds. The model is as it was before."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        _RUNNING.discard(self)

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<LocalServer {self.url}{'' if self._thread.is_alive() else ' (stopped)'}>"


_RUNNING: set[LocalServer] = set()


def _is_no_cut_answer(record: logging.LogRecord) -> bool:
    """False for uvicorn's traceback of a request that `stop` has cut off: uvicorn also says so in a line."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


logging.getLogger("uvicorn.error").addFilter(_is_no_cut_answer)


def stop_all() -> None:
    """Stop every server of this program, also one that no variable refers to any more."""
    for server in list(_RUNNING):
        server.stop()


def _before_exit(function: Callable[[], None]) -> None:
    """Call a function when the program ends, while threads can still be used, if this Python offers that."""
    getattr(threading, "_register_atexit", atexit.register)(function)


def start(loader: str | None = None, *, host: str = "127.0.0.1", port: int = 0, **options: Any) -> LocalServer:
    """Serve a model of this program beside it. Returns when the API answers.

    Args:
        loader: name of a loader, as for `model_app`; without one, `options` has the model.
        port: 0 takes a free one.
        options: the fields of a `ModelInfo` (`model`, `tokenizer`, hooks …), and the options of `model_app`.

    Raises:
        ConfigError, ModelLoadFailed: as for `run_app`.
    """
    # `engine` is a function of a ModelInfo, or the section of the configuration.
    info = {
        name: options.pop(name)
        for name in _INFO & options.keys()
        if name != "engine" or not isinstance(options[name], Mapping)
    }
    if bool(info) == (loader is not None):
        raise ConfigError("start() takes a model and its tokenizer, or a loader.")
    _try_port(host, port)
    app = model_app(info or loader, **options)
    keys = (options.get("server") or {}).get("api_keys") or ["none"]
    server = LocalServer(app, _listener(host, port), keys[0])
    server.start()
    return server


def _listener(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family)


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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    named = {"id": given.id} if given.id else {}
    try:
        run_app(
            given.loader, host=given.host, port=given.port, kwargs=read_yaml(given.kwargs), device=given.device, **named
        )
    except (ConfigError, TroupeError, yaml.YAMLError) as error:
        sys.exit(f"troupe: {error}")
    except KeyboardInterrupt:
        sys.exit("troupe: interrupted.")


if __name__ == "__main__":
    main()
