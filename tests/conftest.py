"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A Ray Serve for the whole session; the address of its proxy."""
    from tests.serving import cluster as running

    with running() as address:
        yield address
