"""What `troupe bench` measures: servers that run already, and peers that it starts, waits for and stops."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.cli.bench.peers import PEERS, Peer
from deployments.cli.endpoint.processes import answers, end_of, free_port, running
from deployments.core.errors import ConfigError

_START_S = 600.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers.

    Attributes:
        url: of its OpenAI API, with `/v1`.
        models: what requests name, in turns.
        command: how it was started; empty for one that ran already.
        version: what its program says of itself.
        process: id of the process that it was started as.
        idle_cores: processor time that it takes in a second while nobody asks.
    """

    name: str
    url: str
    models: Sequence[str]
    command: str = ""
    version: str = ""
    process: int = 0
    idle_cores: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What peers serve.

    Attributes:
        model: folder or name of the checkpoint.
        gguf, ct2: the same weights for llama.cpp and CTranslate2, if they are given.
        at_once: the most conversations at a time.
        positions: tokens of the longest conversation, at most.
    """

    model: str
    gguf: str = ""
    ct2: str = ""
    at_once: int = 16
    positions: int = 4096


@dataclass(frozen=True, slots=True)
class Chosen:
    """A peer as the command line has it.

    Attributes:
        name: in the table.
        program: in place of the peer's own; empty for that one.
        options: further arguments; they win over the peer's best settings.
    """

    name: str
    peer: str
    program: str = ""
    options: tuple[str, ...] = ()


def written_target(text: str, models: Sequence[str]) -> Target:
    """A target as the command line has it: `URL` or `NAME=URL`.

    Raises:
        ConfigError: it is not a URL of HTTP.
    """
    name, found, url = text.partition("=")
    if not found or "://" in name:
        name, url = text, text
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {text!r} should be a URL such as http://127.0.0.1:8000/v1, or NAME=URL.")
    return Target(name, url.rstrip("/"), tuple(models))


def written_peer(text: str) -> Chosen:
    """A peer as the command line has it: `[NAME=]PEER[@PROGRAM] [OPTIONS]`.

    Raises:
        ConfigError: there is no peer of this name.
    """
    first, *options = shlex.split(text) or [""]
    written, _, program = first.partition("@")
    name, _, peer = written.rpartition("=")
    if peer not in PEERS:
        raise ConfigError(f"--peer {peer!r}: there are {', '.join(PEERS)}.")
    return Chosen(name or peer, peer, program, tuple(options))


def peer_command(chosen: Chosen, weights: Weights, port: int) -> list[str]:
    """The command of a peer, with its best settings.

    Raises:
        ConfigError: it is not installed, or it needs weights in another form.
    """
    peer = PEERS[chosen.peer]
    for each in peer.needs:
        if not getattr(weights, each):
            raise ConfigError(f"--peer {chosen.name} needs --{each}, the same weights in its own form.")
    places = {
        "model": weights.model,
        "gguf": weights.gguf,
        "ct2": weights.ct2,
        "port": port,
        "id": chosen.name,
        "cores": len(os.sched_getaffinity(0)),
        "at_once": weights.at_once,
        "all_positions": weights.at_once * weights.positions,
    }
    arguments = [part.format(**places) for part in (*peer.command, *peer.best)]
    return [_program(chosen, peer), *arguments, *chosen.options]


def _program(chosen: Chosen, peer: Peer) -> str:
    wanted = chosen.program or peer.program
    folders = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    program = shutil.which(wanted, path=folders)
    if program is None:
        raise ConfigError(f"--peer {chosen.name}: {wanted} is not installed. Name its program: {chosen.name}@PATH.")
    if peer.module:
        looks = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({peer.module!r}) is None)"
        if subprocess.run([program, "-c", looks], capture_output=True, check=False).returncode:
            raise ConfigError(
                f"--peer {chosen.name}: {program} does not have the module {peer.module}. "
                f"Name a Python that has it: {chosen.name}@PATH."
            )
    return program


def installed(weights: Weights) -> tuple[list[Chosen], list[str]]:
    """All peers that can be started, and why the others cannot."""
    found, missing = [], []
    for name in PEERS:
        chosen = Chosen(name, name)
        try:
            peer_command(chosen, weights, 0)
        except ConfigError as error:
            missing.append(str(error))
        else:
            found.append(chosen)
    return found, missing


@contextlib.contextmanager
def running_peer(chosen: Chosen, weights: Weights) -> Iterator[Target]:
    """A peer, from its first answer on until it has stopped.

    Raises:
        ConfigError: see `peer_command`; or it ends, or does not answer in time: the message has the end of its output.
    """
    peer = PEERS[chosen.peer]
    port = free_port()
    command = peer_command(chosen, weights, port)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "output.log"
        with running(command, log, environment=peer.environment) as process:
            url = f"http://127.0.0.1:{port}/v1"
            if not answers(f"{url}/models", process, _START_S):
                raise ConfigError(f"--peer {chosen.name} does not answer: {end_of(log)}")
            model = weights.model if peer.by_folder else chosen.name
            written = shlex.join([*(f"{name}={value}" for name, value in peer.environment.items()), *command])
            yield Target(chosen.name, url, (model,), written, _version(command[0], peer), process.pid)


def _version(program: str, peer: Peer) -> str:
    """The last line that `--version` prints; empty for Python, whose packages are among the conditions."""
    if not peer.version:
        return ""
    done = subprocess.run([program, *peer.version], capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines and not done.returncode else ""
