"""The processes that listen on a TCP port of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from deployments.core.errors import ConfigError

_held: list[IO[str]] = []


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


def claim(host: str, port: int) -> None:
    """Keep a port for this process until it ends, from before Ray starts, which listens only seconds later.

    Two HTTP servers of Ray Serve can listen on the same port, and each would get a part of the requests.

    Raises:
        ConfigError: a process listens there, or has claimed it; the message names the process. Or nobody can listen
            there.
    """
    folder = _claims_folder()
    with folder.joinpath("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A server of ours is named by its command, and not by the process of Ray that listens.
        for process, place in _claims(folder, port):
            if _clash(place, host):
                raise taken(port, _in_words(process))
        _refuse_taken(host, port)
        file = folder.joinpath(f"{port}-{os.getpid()}").open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        print(host, file=file, flush=True)
        _held.append(file)


def _refuse_taken(host: str, port: int) -> None:
    found = holder(host, port)
    if found is not None:
        raise taken(port, found)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}. Set http_options.host to an address of "
            "this machine, and http_options.port to a free port."
        ) from None


def taken(port: int, holder: str) -> ConfigError:
    """The error for a port that another process has."""
    return ConfigError(f"port {port} is taken by {holder}. End it, or set another http_options.port.")


def intruder(host: str, port: int, mark: tuple[str, str]) -> str | None:
    """A description of a process of this user that listens there too and is not of our Ray; None if there is none.

    Args:
        mark: a variable, and its value in the environment of every process of our Ray.
    """
    for connection in psutil.net_connections(kind="tcp"):
        place, process = connection.laddr, connection.pid
        if connection.status != psutil.CONN_LISTEN or place.port != port or process is None:
            continue
        with contextlib.suppress(psutil.Error):
            if _clash(place.ip, host) and not _is_ours(psutil.Process(process), mark):
                return _in_words(process)
    return None


def _is_ours(process: psutil.Process, mark: tuple[str, str]) -> bool:
    # Ray's actors write their title over their environment; HAProxy can outlive the process that has started it.
    return os.getpid() in [parent.pid for parent in process.parents()] or process.environ().get(mark[0]) == mark[1]


def _claims_folder() -> Path:
    """A folder of this user alone, the same in all of the user's processes."""
    folder = Path(tempfile.gettempdir()) / f"troupe-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if folder.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise ConfigError(f"{folder} can be used by others. Remove it, or set TMPDIR to a folder of your own.")
    return folder


def _claims(folder: Path, port: int) -> Iterator[tuple[int, str]]:
    """The processes that have claimed a port, and their hosts. Files of processes that have ended are removed."""
    for path in folder.glob(f"{port}-*"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield int(path.name.partition("-")[2]), file.read().strip()
            else:
                path.unlink()


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
            # Ray fills the titles of its processes up with spaces.
            command = " ".join(" ".join(psutil.Process(process).cmdline()).split()) or psutil.Process(process).name()
            return f"process {process} ({command[:80]})"
        return f"process {process}"
    return "a process of another user"
