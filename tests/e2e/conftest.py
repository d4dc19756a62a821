"""The demo model behind a real Ray Serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving import serving

DEMO: dict[str, Any] = {
    "id": "demo",
    "loader": "model_loaders.demo:load_model",
    "aliases": ["gpt-3.5-turbo-0613"],
    "engine": {"kind": "auto", "max_rows": 16},
}


@pytest.fixture(scope="session")
def demo(cluster: str) -> Iterator[str]:
    """The base URL, without /v1, of the application that serve_config.yaml starts."""
    with serving(cluster, {"models": [DEMO], "max_models_per_replica": 2}) as url:
        yield url
