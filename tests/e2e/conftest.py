"""Servers that several files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.ingress import OpenAIIngress
from tests.e2e.test_added_models import args, write_all
from tests.faults.clients import KEY
from tests.serving import serving

TINY: dict[str, Any] = {
    "id": "tiny",
    "loader": "tests.openai.tiny_models:load_model",
    "kwargs": {"length": 2048},
    "engine": {"pack_linears": False, "max_batch_size": 16, "threads": 1},
}


@pytest.fixture(scope="session")
def two_ingresses(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Two replicas and two ingresses of models that come while they run and of `tiny`; the folder of their files."""
    place = tmp_path_factory.mktemp("two-ingresses")
    write_all(place)
    (place / "captures").mkdir()
    given = args(place)
    given["models"].append({**TINY, "preload": True})
    given["api"]["admin_keys"].append(KEY)
    given["api"]["captures"] = {"dir": str(place / "captures")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deployments.app.OpenAIIngress", OpenAIIngress.options(num_replicas=2))
        with serving(cluster, given, num_replicas=2) as url:
            yield url, place
