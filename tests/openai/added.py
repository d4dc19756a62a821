"""Servers whose models come while they run, and what tests ask of them."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from tests.openai.conftest import Server

ADMIN = {"Authorization": "Bearer admin"}
CLIENT = {"Authorization": "Bearer client"}

Start = Callable[..., Server]


def model(folder: Path, **fields: Any) -> dict[str, Any]:
    """The entry of the model `base`, from a folder."""
    return {
        "id": "base",
        "loader": "model_loaders.auto:load_model",
        "kwargs": {"model_name": str(folder)},
        "engine": {"pack_linears": False, "threads": 1},
        **fields,
    }


@contextlib.contextmanager
def starting(place: Path) -> Iterator[Start]:
    """Starts servers of some models, whose state and watched folders are in `place`; they end with the block."""
    servers: list[Server] = []

    def begin(models: list[dict[str, Any]], **args: Any) -> Server:
        api = {"api_keys": ["client"], "admin_keys": ["admin"], "admin_roots": [str(place / "allowed")]}
        given = {"state_dir": str(place / "state"), **args}
        server = Server({**api, **given.pop("api", {})}, models, **given)
        server.start()
        servers.append(server)
        return server

    yield begin
    for server in servers:
        server.stop()
    shutil.rmtree(place / "state", ignore_errors=True)
    for folder in (place / "run", place / "allowed"):
        shutil.rmtree(folder)
        folder.mkdir()


def complete(server: Server, model: str, **fields: Any) -> requests.Response:
    body = {"model": model, "prompt": "ab", "max_tokens": 4, "temperature": 0, **fields}
    return requests.post(f"{server.url}/v1/completions", json=body, headers=CLIENT, timeout=60)


def admin(server: Server, method: str, path: str = "", body: Any = None, headers: Any = ADMIN) -> requests.Response:
    return requests.request(method, f"{server.url}/admin/models{path}", json=body, headers=headers, timeout=60)


def states(server: Server, query: str = "?refresh") -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in admin(server, "GET", query).json()["data"]}


def listed(server: Server) -> list[str]:
    return [model["id"] for model in requests.get(f"{server.url}/v1/models", headers=CLIENT, timeout=10).json()["data"]]


def until(check: Callable[[], bool]) -> None:
    """Wait for what a task in the background brings about."""
    end = time.monotonic() + 30
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)
