"""A server of the API on a real socket, over the scripted model and the real host."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from openai import OpenAI

from deployments.local import make_app

SCRIPTED = "tests.openai.scripted:load_model"
MODELS = [
    {"id": "org/scripted", "loader": SCRIPTED, "aliases": ["gpt-3.5-turbo-0613"]},
    {
        "id": "merging",
        "loader": SCRIPTED,
        "api": {"merge_consecutive_roles": True, "default_params": {"temperature": 0}},
    },
]


class Server:
    """uvicorn in a thread of its own."""

    def __init__(self, api: dict[str, Any], models: list[dict[str, Any]], **args: Any) -> None:
        defaults = {"models": models, "max_models_per_replica": len(models), "settle_s": 0.05, "api": api}
        app = make_app({**defaults, **args})
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def start(self) -> None:
        self._thread.start()
        while not self._uvicorn.started:
            time.sleep(0.005)

    def leave(self) -> None:
        """Begin to end."""
        self._uvicorn.should_exit = True

    def stop(self) -> None:
        self.leave()
        self._thread.join(10)
        self._socket.close()

    def client(self, **options: Any) -> OpenAI:
        """The official client, which checks every response against its types."""
        options = {"api_key": "none", "max_retries": 0, "timeout": 20, "_strict_response_validation": True, **options}
        return OpenAI(base_url=options.pop("base_url", f"{self.url}/v1"), **options)


Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """Starts servers; keyword arguments are options of the API."""
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []

        def start(models: list[dict[str, Any]] | None = None, **api: Any) -> Server:
            server = Server(api, models or MODELS)
            server.start()
            stack.callback(server.stop)
            servers.append(server)
            return server

        yield start
        for server in servers:
            server.leave()


@pytest.fixture(scope="session")
def server(serve: Serve) -> Server:
    return serve()


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    return server.client()
