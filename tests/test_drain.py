"""Which Ray `deployments.drain` joins; how it ends is in tests/faults/test_drain.py."""

from __future__ import annotations

import pytest

from deployments import drain
from tests.serving import free_port


def test_the_ray_that_auto_finds_may_be_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is patched: `auto` takes any Ray that runs on this machine, such as these tests' own."""
    dead = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr(drain, "canonicalize_bootstrap_address", lambda address: dead if address == "auto" else address)
    fault = drain._unreachable("auto")
    assert fault is not None
    assert fault.startswith(f"RAY_ADDRESS=auto, but no Ray answers at {dead} (")


def test_a_ray_of_its_own_is_always_reached() -> None:
    assert drain._unreachable("local") is None
