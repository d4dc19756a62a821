"""Servers that several files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.ingress import OpenAIIngress
from tests.e2e.test_added_models import args, write_all
from tests.faults.clients import KEY
from tests.serving import serving


@pytest.fixture(scope="session")
def two_ingresses(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Two replicas and two ingresses of models that come while they run and of `tiny`; the folder of their files."""
    place = tmp_path_factory.mktemp("two-ingresses")
    write_all(place)
    (place / "captures").mkdir()
    given = args(place)
    loader = {"loader": "tests.openai.tiny_models:load_model", "kwargs": {"length": 2048}}
    given["models"].append({"id": "tiny", "preload": True, **loader})
    given["api"]["admin_keys"].append(KEY)
    given["api"]["captures"] = {"dir": str(place / "captures")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deployments.app.OpenAIIngress", OpenAIIngress.options(num_replicas=2))
        with serving(cluster, given, num_replicas=2) as url:
            yield url, place
