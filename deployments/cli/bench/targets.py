"""What `troupe bench` measures: servers that run already, and peers that it starts, waits for and stops."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.cli.endpoint.processes import answers, end_of, free_port, running
from deployments.core.errors import ConfigError

_TROUPE = (sys.executable, "-m", "deployments.cli.main", "serve")

PEERS: dict[str, tuple[str, ...]] = {
    "troupe": (*_TROUPE, "{model}", "--port", "{port}", "--id", "{id}"),
    "transformers": ("transformers", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}"),
    "transformers-cb": (
        *("transformers", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}"),
        "--continuous-batching",
    ),
    "llama.cpp": ("llama-server", "-m", "{gguf}", "--host", "127.0.0.1", "--port", "{port}", "--alias", "{id}"),
    "ctranslate2": (
        *(*_TROUPE, "model_loaders.backends.ctranslate2:load_model"),
        *("--kwargs", "{{path: {ct2}}}", "--port", "{port}", "--id", "{id}"),
    ),
    "vllm": ("vllm", "serve", "{model}", "--port", "{port}", "--served-model-name", "{id}"),
    "sglang": (
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", "{model}"),
        *("--port", "{port}", "--served-model-name", "{id}"),
    ),
}
"""Commands of servers for the same weights. `{gguf}` and `{ct2}` are what `--gguf` and `--ct2` name."""

_NEEDS = {"llama.cpp": ("gguf",), "ctranslate2": ("ct2",)}
# These name a model as they were given it.
_BY_FOLDER = ("transformers", "transformers-cb")


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers.

    Attributes:
        url: of its OpenAI API, with `/v1`.
        command: how it was started; empty for one that ran already.
    """

    name: str
    url: str
    model: str
    command: str = ""


def written_target(text: str, model: str) -> Target:
    """A target as the command line has it: `URL` or `NAME=URL`.

    Raises:
        ConfigError: it is not a URL of HTTP.
    """
    name, found, url = text.partition("=")
    if not found or "://" in name:
        name, url = text, text
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {text!r} should be a URL such as http://127.0.0.1:8000/v1, or NAME=URL.")
    return Target(name, url.rstrip("/"), model)


def peer_command(name: str, model: str, port: int, extra: Mapping[str, str], options: Sequence[str] = ()) -> list[str]:
    """The command of a peer.

    Args:
        model: folder or name of the checkpoint.
        extra: `gguf` and `ct2`, as far as they are given.
        options: further arguments.

    Raises:
        ConfigError: there is no peer of this name, it is not installed, or it needs weights in another form.
    """
    if name not in PEERS:
        raise ConfigError(f"--peer {name!r}: there are {', '.join(PEERS)}.")
    for each in _NEEDS.get(name, ()):
        if not extra.get(each):
            raise ConfigError(f"--peer {name} needs --{each}, the same weights in its own form.")
    command = [part.format(model=model, port=port, id=name, **extra) for part in PEERS[name]]
    program = shutil.which(command[0], path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if program is None:
        raise ConfigError(f"--peer {name}: {command[0]} is not installed.")
    return [program, *command[1:], *options]


@contextlib.contextmanager
def running_peer(
    name: str,
    model: str,
    *,
    extra: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    start_s: float = 600.0,
) -> Iterator[Target]:
    """A peer, from its first answer on until it has stopped.

    Raises:
        ConfigError: see `peer_command`; or it ends, or does not answer in time: the message has the end of its output.
    """
    port = free_port()
    command = peer_command(name, model, port, extra or {}, options)
    with tempfile.TemporaryDirectory() as folder, running(command, log := Path(folder) / "output.log") as process:
        url = f"http://127.0.0.1:{port}/v1"
        if not answers(f"{url}/models", process, start_s):
            raise ConfigError(f"--peer {name} does not answer: {end_of(log)}")
        yield Target(name, url, model if name in _BY_FOLDER else name, " ".join(command))
