"""Who listens on a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from deployments.cli import ports
from deployments.cli.endpoint.processes import free_port
from deployments.core.errors import ConfigError


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


CLAIM = "import sys; from deployments.cli import ports; ports.claim(sys.argv[1], int(sys.argv[2])); print('has it')"


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "localhost", True),
        ("127.0.0.1", "127.0.0.2", False),
    ],
)
def test_a_claimed_port_is_taken_before_anybody_listens(first: str, second: str, clash: bool) -> None:
    port = free_port()
    wait = f"{CLAIM}; sys.stdout.flush(); sys.stdin.read()"
    command = [sys.executable, "-c", wait, first, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdin is not None
        assert one.stdout is not None
        assert one.stdout.readline() == "has it\n"
        later = subprocess.run([sys.executable, "-c", CLAIM, second, str(port)], capture_output=True, text=True)
        one.stdin.close()
    assert (f"port {port} is taken by process {one.pid} (" in later.stderr) == clash
    assert (later.stdout == "has it\n") != clash
    again = subprocess.run([sys.executable, "-c", CLAIM, second, str(port)], capture_output=True, text=True)
    assert again.stdout == "has it\n"


def test_who_has_claimed_a_port_is_named_and_not_the_process_that_listens_for_it() -> None:
    wait = f"{CLAIM}; sys.stdout.flush(); sys.stdin.read()"
    port = free_port()
    command = [sys.executable, "-c", wait, "127.0.0.1", str(port), "   many   spaces   "]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdin is not None
        assert one.stdout is not None
        assert one.stdout.readline() == "has it\n"
        said = f"port {port} is taken by process {one.pid} \\(\\S+( \\S+)* ?\\)"
        with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match=said):
            ports.claim("127.0.0.1", port)
        one.stdin.close()


def test_an_address_of_another_machine_cannot_be_claimed() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        ports.claim("192.0.2.1", free_port())


def test_a_second_listener_of_this_user_is_an_intruder() -> None:
    mark = ("TROUPE_TEST_MARK", "mine")
    serve = (
        "import socket; s = socket.create_server(('127.0.0.1', 0), reuse_port=True); print(s.getsockname()[1], "
        "flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", serve], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdin is not None
        assert one.stdout is not None
        port = int(one.stdout.readline())
        assert ports.intruder("127.0.0.1", port, mark) is None  # a child of this process
        with socket.create_server(("127.0.0.1", port), reuse_port=True):
            found = ports.intruder("127.0.0.1", port, mark)
        one.stdin.close()
    assert found is not None
    assert f"process {os.getpid()} (" in found


def test_what_only_this_machine_reaches() -> None:
    assert all(map(ports.is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(ports.is_loopback, ("0.0.0.0", "::", "10.0.0.1", "192.168.0.2")))
