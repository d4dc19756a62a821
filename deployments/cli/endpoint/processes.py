"""Programs that a command starts beside itself, and stops."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from deployments.cli.endpoint import guard

_STOP_S = 30.0
_ports = random.SystemRandom()


def free_port() -> int:
    """A TCP port that nobody listens on at this moment.

    It is none of those that Ray's workers (10002 to 19999), the fast mode (30000 to 31000) or Linux (from 32768) take:
    one of these could be gone before its server starts.
    """
    while True:
        port = _ports.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def running(
    command: Sequence[str],
    log: Path,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A program, until the block ends.

    It ends with this process, however that ends: guard.py runs it.

    Args:
        log: file for what it prints.
        environment: variables beside those of this process.
        descriptors: open files that it gets.
    """
    with log.open("ab") as output:
        # A session of its own: all that it has started can be ended with it, and Ctrl-C reaches this process alone.
        process = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, str(_STOP_S), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            pass_fds=descriptors,
        )
    try:
        yield process
    finally:
        stop(process)
        if process.stdin is not None:
            process.stdin.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it has started; kill what has not ended after 30 s."""
    ask_to_end(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    _signal(process, signal.SIGKILL)
    guard.send(guard.started(process.pid), signal.SIGKILL)
    process.wait()


def ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """Ask a program and all that it has started to end."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def answers(url: str, process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Wait until a URL answers with status 200; False if the program ends before, or after `limit_s`."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return True
        time.sleep(0.2)
    return False


def family(process: int) -> dict[int, float]:
    """A process and all that it has started, by id, with the seconds of processor time that each has taken."""
    found = _usage(Path("/proc"))
    members = {process} & found.keys()
    while more := {pid for pid, (parent, _) in found.items() if parent in members} - members:
        members |= more
    return {pid: found[pid][1] for pid in members}


def thread_seconds(process: int) -> dict[int, float]:
    """The seconds of processor time that each thread of a process has taken, by id."""
    return {thread: seconds for thread, (_, seconds) in _usage(Path(f"/proc/{process}/task")).items()}


def _usage(folder: Path) -> dict[int, tuple[int, float]]:
    """Parent, and seconds of processor time, of every process or thread in a folder of /proc."""
    found: dict[int, tuple[int, float]] = {}
    for stat in folder.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            taken = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            found[int(stat.parent.name)] = int(fields[1]), taken
    return found


@contextlib.contextmanager
def standing_still(processes: Iterable[int]) -> Iterator[None]:
    """Programs of `running`, by their ids there, and all that they have started do nothing until the block ends."""
    held: set[int] = set()
    try:
        for process in processes:
            while more := guard.started(process) - held:  # also what started while the others were held
                held |= more
                guard.send(more, signal.SIGSTOP)
        yield
    finally:
        guard.send(held, signal.SIGCONT)


def processor_seconds(process: int) -> float:
    """Processor time that a process and all that it has started have taken."""
    return sum(family(process).values())


def end_of(log: Path) -> str:
    """The last lines of a log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return text[-1500:].strip()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """While the block runs, SIGTERM ends this process as Ctrl-C does: what it has started is stopped."""

    def leave(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
