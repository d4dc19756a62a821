"""The same API in one process, without Ray: for a debugger, a notebook, a first try of a loader.

python -m deployments.local --loader path/to/my_model.py:load_model
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI

from deployments.config import AppArgs, parse_args
from deployments.host import ModelHost
from deployments.openai.app import build_api
from model_loaders.contract import ModelInfo, as_model_info

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
    checked = parse_args(args)
    models = ModelHost(checked, device, given=given)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await models.preload()
        yield
        await models.close()

    app = build_api(models, checked.api)
    app.router.lifespan_context = lifespan
    return app


def model_app(model_info_from: Source | None = None, *, device: str | None = None, **entry: Any) -> FastAPI:
    """The API over one model, pinned.

    Args:
        model_info_from: a loaded model, or the name of a loader (`module:function`, `path.py:function`, or `path.py`
            with a module-level `model_info`); None reads the name from the environment variable ENTRYPOINT.
        device: where the loader puts the model.
        entry: further fields of the model's entry in serve_config.yaml (`id`, `kwargs`, `aliases`, `engine`, …).
    """
    source = model_info_from if model_info_from is not None else os.environ.get("ENTRYPOINT", "model_entrypoint.py")
    if isinstance(source, str):
        model = {"id": "model", "loader": source, "pinned": True, **entry}
        return make_app({"models": [model]}, device=device)
    info = as_model_info(source, "given to run_app")
    model = {"id": info.model_name or "model", "loader": "given", "pinned": True, **entry}
    return make_app({"models": [model]}, given={model["id"]: info}, device=device)


def run_app(
    model_info_from: Source | None = None, *, host: str = "127.0.0.1", port: int = 8000, **options: Any
) -> None:
    """Serve one model until interrupted; `options` as for `model_app`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    uvicorn.run(model_app(model_info_from, **options), host=host, port=port, log_level="info")


def main() -> None:
    """Command line of `python -m deployments.local`."""
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=__doc__)
    parser.add_argument("--loader", help="module:function, path.py:function or path.py; default: $ENTRYPOINT")
    parser.add_argument("--kwargs", default="{}", help="the loader's keyword arguments, as YAML or JSON")
    parser.add_argument("--id", default="model", help="the name clients send as `model`")
    parser.add_argument("--device", help="such as cuda:0; default: the first GPU, else cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    run_app(
        given.loader,
        host=given.host,
        port=given.port,
        id=given.id,
        kwargs=yaml.safe_load(given.kwargs),
        device=given.device,
    )


if __name__ == "__main__":
    main()
