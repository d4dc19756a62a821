"""The runs of a bench: in every round, each server gets the same prompts, in an order that changes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deployments.cli.bench.client import Job
from deployments.cli.bench.report import figures, ratios, summary
from deployments.cli.bench.targets import Target
from deployments.cli.endpoint.processes import processor_seconds, standing_still
from deployments.core.errors import ConfigError

Result = dict[str, Any]
Run = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is asked in one line of the table.

    Attributes:
        concurrency: conversations at a time.
        conversations: of a run.
        seed: of the prompts, for all rounds.
        key: of the API, for servers that the bench has not started.
    """

    workload: str
    concurrency: int
    conversations: int
    rounds: int
    seed: int
    key: str = ""


def measured(cell: Cell, targets: Sequence[Target]) -> list[Result]:
    """A result for each server, after a run that does not count. One that refuses this workload has an error alone."""
    refused: dict[str, str] = {}
    for target in targets:
        # The first run fills caches and buffers.
        with _alone(target, targets):
            warm = run_client(_job(cell, target, 0, cell.concurrency))
        if all(each["error"] for each in warm["requests"]):
            refused[target.name] = warm["requests"][0]["error"]
    able = [target for target in targets if target.name not in refused]
    runs: dict[str, list[dict[str, float]]] = {target.name: [] for target in able}
    errors: dict[str, str] = {}
    for number in range(cell.rounds):
        turn = number % max(1, len(able))
        for target in (*able[turn:], *able[:turn]):
            with _alone(target, targets):
                found = measured_run(cell, target, number + 1)
            runs[target.name].append(figures(found))
            for each in found["requests"]:
                if each["error"]:
                    errors.setdefault(target.name, each["error"])
    return [
        _result(cell, target.name, runs, refused.get(target.name) or errors.get(target.name, "")) for target in targets
    ]


def _alone(target: Target, targets: Sequence[Target]) -> contextlib.AbstractContextManager[None]:
    """The other servers that the bench has started stand still meanwhile: an idle Ray takes a tenth of a core."""
    return standing_still([each.process for each in targets if each.process and each is not target])


def _result(cell: Cell, name: str, runs: Mapping[str, Sequence[Mapping[str, float]]], error: str) -> Result:
    result: Result = {"workload": cell.workload, "concurrency": cell.concurrency, "target": name, "error": error}
    if name not in runs:
        return {**result, "refused": True}
    first = next(iter(runs.values()))
    return {**result, **summary(runs[name]), "times": ratios(first, runs[name]), "rounds": runs[name]}


def measured_run(cell: Cell, target: Target, number: int) -> Run:
    """What the client has measured in a run with the prompts of a number, and the `processor_seconds` of the server.

    What the server takes while nobody asks is not among them.
    """
    before = processor_seconds(target.process) if target.process else 0.0
    found = run_client(_job(cell, target, number, cell.conversations))
    if target.process:
        idle = target.idle_cores * found["seconds"]
        found["processor_seconds"] = max(0.0, processor_seconds(target.process) - before - idle)
    return found


def _job(cell: Cell, target: Target, number: int, conversations: int) -> Job:
    return Job(
        url=target.url,
        models=target.models,
        workload=cell.workload,
        concurrency=cell.concurrency,
        conversations=conversations,
        seed=cell.seed + 10_000 * number,
        key="" if target.command else cell.key,
    )


def run_client(job: Job) -> Run:
    """What the client's process has measured of a job.

    Raises:
        ConfigError: the process has failed.
    """
    command = [sys.executable, "-m", "deployments.cli.bench.client"]
    done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"The client of the bench has failed: {done.stderr[-1500:]}")
    found: Run = json.loads(done.stdout)
    return found
