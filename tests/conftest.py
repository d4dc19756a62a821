"""What every test shares."""

from __future__ import annotations

import os
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
# Ray gives its workers little of a processor that somebody else uses: here, the tests in the other process.
os.environ.setdefault("RAY_worker_niceness", "0")

os.environ.setdefault("TROUPE_LOGS", str(Path(tempfile.gettempdir()) / "troupe-test-logs"))

use_own_ray()  # before anything imports Ray


REAL_SERVERS = ("e2e", "faults", "seeds", "test_dockerfile.py", "test_package.py", "test_ray_internals.py")
"""Folders and files of tests that start servers; two of them at once would time each other."""


class OneAtATime(LoadScopeScheduling):
    """How pytest-xdist shares out tests: a file stays on one worker, and all that start servers are on the same."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "servers" if file.removeprefix("tests/").split("/")[0] in REAL_SERVERS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneAtATime:
    return OneAtATime(config, log)


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
