"""The server that `python -m deployments.local` starts."""

from __future__ import annotations

import pytest
import uvicorn
from ray.serve.config import HTTPOptions
from ray.serve.schema import HTTPOptionsSchema

from deployments.local import run_app


def test_idle_connections_outlast_what_clients_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: started.append(server.config))
    run_app("model_loaders.demo:load_model", port=0)
    assert started[0].timeout_keep_alive >= 75


def test_so_do_those_of_ray_serve() -> None:
    """Its proxy, HAProxy in the fast mode, and the servers of replicas there all read this option."""
    for options in (HTTPOptions(), HTTPOptionsSchema()):
        assert options.keep_alive_timeout_s >= 75
