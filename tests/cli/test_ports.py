"""Who listens on a port."""

from __future__ import annotations

import os
import socket

import pytest

from deployments.cli import ports


@pytest.mark.parametrize(
    ("listens", "wanted", "clash"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.2", "127.0.0.1", False),
    ],
)
def test_the_holder_of_a_port_is_named(listens: str, wanted: str, clash: bool) -> None:
    with socket.create_server((listens, 0)) as server:
        port = server.getsockname()[1]
        holder = ports.holder(wanted, port)
        assert (holder is not None) == clash
        if holder:
            assert f"process {os.getpid()} (" in holder
        assert ports.listeners(port) == {listens: os.getpid()}
    assert ports.holder(wanted, port) is None


def test_a_socket_that_shares_its_port_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as server:
        found = ports.holder("127.0.0.1", server.getsockname()[1])
    assert found is not None


def test_what_only_this_machine_reaches() -> None:
    assert all(map(ports.is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(ports.is_loopback, ("0.0.0.0", "::", "10.0.0.1", "192.168.0.2")))
