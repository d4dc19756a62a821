"""Servers that `troupe bench` can start, with settings for many requests at a time."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server for the same weights.

    Braces in arguments are filled in: `model`, `gguf` and `ct2` as the command line has them, `port`, `id`, `cores`,
    `at_once` (the most conversations at a time) and `all_positions` (the tokens of all of them).

    Attributes:
        program: what runs it, as PATH or this environment has it.
        command: its arguments.
        best: further ones, for many requests at a time.
        environment: variables that it starts with.
        needs: weights in another form.
        module: a module of Python that must be installed, if the program is Python.
        by_folder: it names the model as it was given it.
        version: arguments with which the program says its version.
    """

    program: str
    command: tuple[str, ...]
    best: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    module: str = ""
    by_folder: bool = False
    version: tuple[str, ...] = ()


_LOCAL = ("--host", "127.0.0.1", "--port", "{port}")
_TROUPE = ("-m", "deployments.cli.main", "serve")
_NAMED = ("--port", "{port}", "--id", "{id}")
_TRANSFORMERS = ("serve", "{model}", *_LOCAL)
# Otherwise glibc gives freed tensors back to the system at every step.
_KEEPS_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}

PEERS: dict[str, Peer] = {
    "troupe": Peer(
        program=sys.executable, command=(*_TROUPE, "{model}", *_NAMED), best=("--max-batch-size", "{at_once}")
    ),
    "transformers": Peer(
        program="transformers", command=_TRANSFORMERS, environment=_KEEPS_MEMORY, by_folder=True, version=("version",)
    ),
    "transformers-cb": Peer(
        program="transformers",
        command=(*_TRANSFORMERS, "--continuous-batching"),
        best=("--cb-block-size", "64", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "256"),
        environment=_KEEPS_MEMORY,
        by_folder=True,
        version=("version",),
    ),
    "llama.cpp": Peer(
        program="llama-server",
        command=("-m", "{gguf}", *_LOCAL, "--alias", "{id}"),
        best=("--threads", "{cores}", "--parallel", "{at_once}", "--ctx-size", "{all_positions}"),
        needs=("gguf",),
        version=("--version",),
    ),
    "ctranslate2": Peer(
        program=sys.executable,
        command=(*_TROUPE, "model_loaders.backends.ctranslate2:load_model", "--kwargs", "{{path: {ct2}}}", *_NAMED),
        best=("--max-batch-size", "{at_once}"),
        needs=("ct2",),
        module="ctranslate2",
    ),
    "forward": Peer(
        program=sys.executable,
        command=("-m", "deployments.cli.bench.forward", "{model}", "--port", "{port}"),
        environment=_KEEPS_MEMORY,
    ),
    "vllm": Peer(
        program="vllm",
        command=("serve", "{model}", *_LOCAL, "--served-model-name", "{id}"),
        best=("--max-num-seqs", "{at_once}"),
        version=("--version",),
    ),
    "sglang": Peer(
        program=sys.executable,
        command=("-m", "sglang.launch_server", "--model-path", "{model}", *_LOCAL, "--served-model-name", "{id}"),
        best=("--max-running-requests", "{at_once}"),
        module="sglang",
    ),
}
"""By name."""
