"""What every test shares."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from deployments.cli.own_ray import use_own_ray

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")

os.environ.setdefault("TROUPE_LOGS", str(Path(tempfile.gettempdir()) / "troupe-test-logs"))

use_own_ray()  # before anything imports Ray


SERVERS = {
    "serve run": ("e2e/test_serve_run.py",),
    "commands": (
        "e2e/test_fast.py",
        "e2e/test_sweep.py",
        "faults/test_drain.py",
        "test_dockerfile.py",
        "test_package.py",
    ),
    "faults": ("faults/", "e2e/test_large.py"),
    "cluster": ("e2e/", "test_readme.py", "test_scale.py"),
}
"""Files and folders whose tests start servers: by commands, or on one cluster for each of the last two groups."""
ORDER = ("faults", "cluster", "tests/engine/", "serve run", "commands")
"""What begins first: the longest; of three processes two wait for servers while one computes."""


def scope_of(nodeid: str) -> str:
    """What a test stays on one process with."""
    file = nodeid.split("::")[0]
    name = file.removeprefix("tests/")
    return next((group for group, names in SERVERS.items() if name.startswith(names)), file)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keeps what pytest and Python compile of our files, where images are told to keep nothing.

    Otherwise each process compiles every file at every run. What the tests write themselves is left as it is set.
    """
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    try:
        return (yield)
    finally:
        sys.dont_write_bytecode = kept


class ByGroup(LoadScopeScheduling):
    """How pytest-xdist shares out tests: a file stays on one process, and so does a group of `SERVERS`."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        scope = scope_of(item.nodeid)
        return next((i for i, first in enumerate(ORDER) if scope.startswith(first)), len(ORDER))

    items.sort(key=rank)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    config.option.loadscopereorder = False  # the order of the items, in the place of that of their number
    return ByGroup(config, log)


_IMPORTS = 100
_frozen = 0


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_walked() -> None:
    """A full collection, such as that of every model that is unloaded, takes a third of a second for modules alone."""
    global _frozen
    if len(sys.modules) > _frozen + _IMPORTS or not gc.get_freeze_count():
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


@pytest.fixture
def all_is_walked() -> None:
    """For tests of what a full collection leaves: all that they make is walked, and nothing that was there before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A Ray Serve for the whole session; the address of its proxy."""
    from tests.serving import cluster as running

    with running() as address:
        yield address


DEMO: dict[str, Any] = {
    "id": "demo",
    "loader": "model_loaders.demo:load_model",
    "aliases": ["gpt-3.5-turbo-0613"],
    "engine": {"kind": "auto", "max_batch_size": 16},
}


@pytest.fixture(scope="session")
def demo(cluster: str) -> Iterator[str]:
    """The base URL, without /v1, of the application that serve_config.yaml starts."""
    from tests.serving import serving

    with serving(cluster, {"models": [DEMO], "max_models_per_replica": 2}) as url:
        yield url


@pytest.fixture(scope="session")
def two_replicas(cluster: str) -> Iterator[str]:
    """The base URL of two replicas of a model `a` that takes 20 ms a token; their logs are JSON."""
    from tests.faults.clients import API
    from tests.faults.paced import model
    from tests.serving import serving

    args = {"models": [model("a", pace=0.02, preload=True)], "api": API}
    options = {"num_replicas": 2, "ray_actor_options": {"num_gpus": 0, "num_cpus": 0.5}}
    with serving(cluster, args, logging_config={"encoding": "JSON"}, **options) as url:
        yield url
