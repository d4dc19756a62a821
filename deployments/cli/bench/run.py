"""A bench from its first server to its figures."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deployments.cli.bench.conditions import conditions, load
from deployments.cli.bench.measure import Cell, measured
from deployments.cli.bench.targets import Target, Weights, installed, running_peer, written_peer, written_target
from deployments.cli.bench.workloads import positions
from deployments.cli.endpoint.processes import processor_seconds
from deployments.core.errors import ConfigError

_SETTLE_S = 10.0  # Ray goes on starting for a while after its first answer
_IDLE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the command line asks for; see its help."""

    urls: Sequence[str]
    peers: Sequence[str]
    every_peer: bool
    models: Sequence[str]
    workloads: Sequence[str]
    at_once: Sequence[int]
    rounds: int
    conversations: int | None
    gguf: str
    ct2: str
    key: str
    profile: Path | None


def run(wish: Wish) -> dict[str, Any]:
    """Conditions, servers and results, as `--json` writes them; after Ctrl-C those of the cells that were measured.

    Raises:
        ConfigError: what is asked for cannot be measured.
    """
    with _running(wish) as servers:
        targets = rested(servers)
        document: dict[str, Any] = {
            "conditions": conditions(),
            "targets": [asdict(target) for target in targets],
            "interrupted": False,
            "results": [],
        }
        try:
            for cell in cells(wish):
                print(f"{cell.workload}, {cell.concurrency} at a time", file=sys.stderr)
                document["results"] += measured(cell, targets)
                if wish.profile is not None:
                    from deployments.cli.bench.profile import profiled

                    print(profiled(cell, targets[0], wish.profile))
        except KeyboardInterrupt:
            if not document["results"]:
                raise
            document["interrupted"] = True
            print("Interrupted. What was measured before is kept.", file=sys.stderr)
        document["conditions"]["load_after"] = load()
    return document


def rested(targets: Sequence[Target]) -> list[Target]:
    """The same servers, with what each of them takes while nobody asks."""
    if not any(target.process for target in targets):
        return list(targets)
    time.sleep(_SETTLE_S)
    before = [processor_seconds(target.process) for target in targets]
    time.sleep(_IDLE_S)
    return [
        replace(target, idle_cores=(processor_seconds(target.process) - was) / _IDLE_S if target.process else 0.0)
        for target, was in zip(targets, before, strict=True)
    ]


def cells(wish: Wish) -> Iterator[Cell]:
    """What is measured, one after the other."""
    for place, name in enumerate(wish.workloads):
        for at_once in wish.at_once:
            yield Cell(
                workload=name,
                concurrency=at_once,
                conversations=wish.conversations or max(4, 2 * at_once),
                rounds=wish.rounds,
                seed=1_000_000 * (place + 1) + 100_000_000 * at_once,
                key=wish.key,
            )


@contextlib.contextmanager
def _running(wish: Wish) -> Iterator[list[Target]]:
    """The servers, started where they do not run."""
    weights = Weights(
        model=wish.models[0],
        gguf=wish.gguf,
        ct2=wish.ct2,
        at_once=max(wish.at_once),
        positions=max(map(positions, wish.workloads)),
    )
    chosen = [written_peer(each) for each in wish.peers]
    if wish.every_peer:
        others, missing = installed(weights)
        chosen += [each for each in others if each.name not in {one.name for one in chosen}]
        for line in missing:
            print(f"left out: {line}", file=sys.stderr)
    targets = [written_target(each, wish.models) for each in wish.urls]
    _check(wish, [*(target.name for target in targets), *(each.name for each in chosen)])
    with contextlib.ExitStack() as stack:
        for each in chosen:
            targets.append(stack.enter_context(running_peer(each, weights)))
            print(f"{each.name} answers: {targets[-1].command}", file=sys.stderr)
        yield targets


def _check(wish: Wish, names: Sequence[str]) -> None:
    if not names:
        raise ConfigError("Name what is measured: --url of a running server, or --peer for one to start.")
    if len(set(names)) < len(names):
        raise ConfigError("Two servers have one name; write --url NAME=URL or --peer NAME=PEER.")
    if len(wish.models) > 1 and (wish.peers or wish.every_peer):
        raise ConfigError("A peer serves one --model; several models are for servers that run already (--url).")
    if wish.profile is not None and wish.urls:
        raise ConfigError("--profile needs a server that the bench starts: --peer in place of --url.")
