"""Servers that are about to be hurt, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.clients import API
from tests.faults.paced import model
from tests.serving import serving

Say = Callable[[str], None]


@pytest.fixture(scope="session")
def fragile(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A replica with a model `a`, one that ends its process, and one whose engine ends when there is a file `end`.

    Gives its URL and the folder of that file, where `state` is what it keeps of batches.
    """
    folder = tmp_path_factory.mktemp("fragile")
    crashing = {"id": "crashing", "loader": "tests.faults.paced:crashes"}
    kwargs = {"trigger": str(folder / "end")}
    mortal = {"id": "mortal", "loader": "tests.faults.paced:mortal", "kwargs": kwargs, "preload": True}
    models = [model("a", pace=0.05, engine={"max_batch_size": 8}), crashing, mortal]
    args = {"models": models, "max_models_per_replica": 3, "state_dir": str(folder / "state"), "api": API}
    with serving(cluster, args) as url:
        yield url, folder


BATCH = 16
"""The sequences of the model `few`."""


@pytest.fixture(scope="session")
def capped(cluster: str) -> Iterator[str]:
    """A replica for at most 32 requests at once, whose logs are text; its model `short` takes one character.

    At 50 ms a token it is the model `few` that is overloaded, not the machine of the test.
    """
    few = model("few", pace=0.05, preload=True, engine={"max_batch_size": BATCH})
    models = [model("a"), model("short", max_prompt_chars=1), few]
    args = {"models": models, "max_models_per_replica": 3, "max_concurrent_requests": 2 * BATCH}
    with serving(cluster, args, logging_config={"encoding": "TEXT"}) as url:
        yield url


@pytest.fixture
def say(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Say]:
    """Print the figure of a test, also where pytest captures output, and keep it in the report."""
    lines: list[str] = []
    yield lines.append
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for line in lines:
            print(f"\n  {request.node.name}: {line}", end="", flush=True)
            record_property("figure", line)
