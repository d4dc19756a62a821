"""A real Ray Serve for the tests: one cluster per session, one application per test that asks for one."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import ray
import requests
from ray import serve

from deployments.app import application
from deployments.cli.endpoint.processes import free_port
from deployments.config.app import parse_args

_names = itertools.count()


@contextlib.contextmanager
def cluster(cpus: int = 16, gpus: int = 8, port: int | None = None) -> Iterator[str]:
    """A local Ray with logical CPUs and GPUs, and Serve's proxy; yields the proxy's address."""
    folder = tempfile.mkdtemp(prefix="tr", dir="/tmp")  # short: Ray puts sockets there
    port = port or free_port()
    ray.init(
        address="local",
        num_cpus=cpus,
        num_gpus=gpus,
        include_dashboard=False,
        _temp_dir=folder,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": None})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def serving(
    address: str, args: dict[str, Any], logging_config: dict[str, Any] | None = None, **replica_options: Any
) -> Iterator[str]:
    """A running application; yields its base URL without /v1.

    Args:
        address: of the cluster.
        args: as under `args` in serve_config.yaml.
        logging_config: of the application, as in serve_config.yaml.
        replica_options: of the ModelReplica deployment; on CPU unless it says otherwise.
    """
    url = f"{address}/app{next(_names)}"
    deploy(url, args, logging_config, **replica_options)
    try:
        _wait_for(url)
        yield url
    finally:
        serve.delete(_name(url), _blocking=False)  # its replicas end while the next application starts


def deploy(
    url: str, args: dict[str, Any], logging_config: dict[str, Any] | None = None, **replica_options: Any
) -> None:
    """Run an application under a URL; in place of what runs there, as `serve run` with a changed file would."""
    options = {"num_replicas": 1, "ray_actor_options": {"num_gpus": 0}, **replica_options}
    app = application(parse_args(args), **options)
    serve.run(app, name=_name(url), route_prefix=f"/{_name(url)}", logging_config=logging_config)


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _wait_for(url: str, seconds: float = 60.0) -> None:
    """Until an application answers: HAProxy, in the fast mode, hears of it after `serve.run` has returned."""
    end = time.monotonic() + seconds
    while requests.get(f"{url}/health", timeout=10).status_code != 200:
        assert time.monotonic() < end, f"{url} has not answered for {seconds:g} s"
        time.sleep(0.05)
