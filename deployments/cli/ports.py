"""The processes that listen on a TCP port of this machine."""

from __future__ import annotations

import contextlib

import psutil


def listeners(port: int) -> dict[str, int | None]:
    """The addresses that a port is open at, each with its process; None for a process of another user."""
    return {
        connection.laddr.ip: connection.pid
        for connection in psutil.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }


def holder(host: str, port: int) -> str | None:
    """A description of the process that listens where a server for this host would; None if there is none."""
    for address, process in listeners(port).items():
        if _clash(address, host):
            return _in_words(process)
    return None


def is_loopback(address: str) -> bool:
    """Whether an address can be reached only from this machine."""
    return address.startswith("127.") or address in ("localhost", "::1")


def _clash(address: str, host: str) -> bool:
    everywhere = ("0.0.0.0", "::")
    same = {"localhost": "127.0.0.1"}
    return address in everywhere or host in everywhere or same.get(host, host) == address


def _in_words(process: int | None) -> str:
    if process is not None:
        with contextlib.suppress(psutil.Error):
            command = " ".join(psutil.Process(process).cmdline()) or psutil.Process(process).name()
            return f"process {process} ({command[:80]})"
        return f"process {process}"
    return "a process of another user"
