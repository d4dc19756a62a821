"""What Troupe uses of Ray's private parts."""

from __future__ import annotations

import inspect

import pytest
import ray
from ray.serve._private.proxy import HTTPProxy
from ray.serve._private.proxy_router import ProxyRouter
from ray.serve.handle import DeploymentHandle

from deployments import ray_internals
from deployments.cli.endpoint.processes import free_port


def test_the_ray_that_auto_finds_may_be_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is patched: `auto` takes any Ray that runs on this machine, such as these tests' own."""
    dead = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr(
        ray_internals, "canonicalize_bootstrap_address", lambda address: dead if address == "auto" else address
    )
    fault = ray_internals.unreachable("auto", 5)
    assert fault is not None
    assert fault.startswith(f"no Ray answers at {dead} (")


def test_the_version_they_belong_to() -> None:
    assert ray.__version__.startswith("2.60."), "read deployments/ray_internals.py against the new version's source"


@pytest.mark.parametrize(
    ("wanted", "free", "lacking"),
    [
        ('{"CPU": 1}', "{}", True),
        ('{"CPU": 1, "GPU": 2}', '{"CPU": 4, "GPU": 1}', True),
        ('[{"CPU": 1}]', '{"CPU": 4}', True),
        ('{"CPU": 1}', '{"CPU": 1.0}', False),
        ("UNKNOWN", "UNKNOWN", False),
    ],
)
def test_a_deployment_that_waits_for_resources_is_recognized(wanted: str, free: str, lacking: bool) -> None:
    message = (
        "Deployment 'ModelReplica' in application 'troupe' has 1 replicas that have taken more than 30s to be "
        "scheduled. This may be due to waiting for the cluster to auto-scale or for a runtime environment to be "
        f"installed. Resources required for each replica: {wanted}, total resources available: {free}. Use `ray "
        "status` for more details."
    )
    found = ray_internals.unscheduled(message)
    assert found == (f"1 of its replicas wait for {wanted} each, and {free} is left" if lacking else None)


def test_other_messages_say_nothing_of_resources() -> None:
    assert ray_internals.unscheduled("") is None


def test_the_proxy_that_is_wrapped_is_an_asgi_application() -> None:
    assert [*inspect.signature(HTTPProxy.__call__).parameters] == ["self", "scope", "receive", "send"]
    assert inspect.iscoroutinefunction(HTTPProxy.__call__)
    assert callable(ProxyRouter.match_route)
    assert callable(DeploymentHandle.running_replicas_populated)
