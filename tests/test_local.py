"""The server that `python -m deployments.local` starts."""

from __future__ import annotations

import socket

import pytest
import uvicorn
from ray.serve.config import HTTPOptions
from ray.serve.schema import HTTPOptionsSchema

from deployments.core.errors import ConfigError
from deployments.local import run_app


def test_idle_connections_outlast_what_clients_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: started.append(server.config))
    run_app("model_loaders.demo:load_model", port=0)
    assert started[0].timeout_keep_alive >= 75


def test_a_taken_port_is_found_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            run_app("no_such_module:load", port=port)


def test_so_do_those_of_ray_serve() -> None:
    """Its proxy, HAProxy in the fast mode, and the servers of replicas there all read this option."""
    for options in (HTTPOptions(), HTTPOptionsSchema()):
        assert options.keep_alive_timeout_s >= 75
