"""`troupe bench`: workloads against OpenAI APIs and peers that it starts, in turns, as medians of several rounds."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deployments.cli.bench.workloads import WORKLOADS
from deployments.core.errors import ConfigError

SHORT = ("short", "words300", "agent6")
"""Workloads if none is named."""


def bench(
    url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]URL",
            help="A running server, such as http://127.0.0.1:8000/v1; can be given several times.",
            show_default=False,
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[ OPTIONS]",
            help="A server to start for --model, with further options of its own; can be given several times.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Name of the model at each URL; folder or name of the weights for peers.")
    ] = "demo",
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="What is asked; can be given several times. Default: short, words300, agent6.", show_default=False
        ),
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Conversations at a time; can be given several times. Default: 1, 16.", show_default=False
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each with prompts of its own.")] = 3,
    conversations: Annotated[
        int | None,
        typer.Option(
            min=1, help="Conversations of a run. Default: twice those at a time, at least 4.", show_default=False
        ),
    ] = None,
    gguf: Annotated[str, typer.Option(help="The weights for llama.cpp.", show_default=False)] = "",
    ct2: Annotated[str, typer.Option(help="The weights for CTranslate2, a folder.", show_default=False)] = "",
    key_variable: Annotated[
        str, typer.Option(help="Environment variable with the API key for every URL.")
    ] = "OPENAI_API_KEY",
    as_json: Annotated[Path | None, typer.Option("--json", help="File for all figures.", show_default=False)] = None,
    as_svg: Annotated[Path | None, typer.Option("--svg", help="File for a drawing.", show_default=False)] = None,
) -> None:
    """Measure servers with an OpenAI API, side by side.

    In every round each server gets the same prompts, in an order that changes from round to round, from a client in a
    process of its own. Figures are medians over the rounds, after one that does not count.

    \b
    troupe bench --url http://127.0.0.1:8000/v1 --model demo
    troupe bench --peer troupe --peer transformers-cb --model ./my-model --json bench.json --svg bench.svg
    """
    from deployments.cli.bench.report import table
    from deployments.cli.bench.targets import running_peer, written_target

    asked = _checked(workload or SHORT)
    if not url and not peer:
        raise ConfigError("Name what is measured: --url of a running server, or --peer for one to start.")
    with contextlib.ExitStack() as stack:
        targets = [written_target(each, model) for each in url or ()]
        for each in peer or ():
            name, *options = shlex.split(each)
            extra = {"gguf": gguf, "ct2": ct2}
            targets.append(stack.enter_context(running_peer(name, model, extra=extra, options=options)))
            print(f"{name} answers: {targets[-1].command}", file=sys.stderr)
        names = [target.name for target in targets]
        if len(set(names)) < len(names):
            raise ConfigError("Two servers have one name; write --url NAME=URL.")
        found = _measured(
            targets, asked, concurrency or (1, 16), rounds, conversations, os.environ.get(key_variable, "")
        )
        results = list(found)
    document = _document(targets, results)
    if as_json is not None:
        as_json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if as_svg is not None:
        from deployments.cli.bench.plot import svg

        as_svg.write_text(svg(results), encoding="utf-8")
    print(table(results))
    if failed := sum(each["errors"] for each in results):
        print(f"{failed:.0f} requests failed; the first: {_first_error(results)}", file=sys.stderr)
        raise typer.Exit(1)


def _checked(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in WORKLOADS:
            raise ConfigError(f"--workload {name!r}: there are {', '.join(WORKLOADS)}.")
    return names


def _measured(
    targets: Sequence[Any],
    workloads: Sequence[str],
    concurrencies: Sequence[int],
    rounds: int,
    conversations: int | None,
    key: str,
) -> Iterator[dict[str, Any]]:
    """A result for each workload, number at a time and target."""
    from deployments.cli.bench.client import Job
    from deployments.cli.bench.report import against, figures, summary

    for place, name in enumerate(workloads):
        for at_once in concurrencies:
            runs: dict[str, list[dict[str, float]]] = {target.name: [] for target in targets}
            errors: dict[str, str] = {}
            for number in range(rounds + 1):
                seed = 1_000_000 * (place + 1) + 10_000 * number + 100_000_000 * at_once
                turn = number % len(targets)
                for target in (*targets[turn:], *targets[:turn]):
                    count = conversations or max(4, 2 * at_once)
                    job = Job(
                        url=target.url,
                        model=target.model,
                        workload=name,
                        concurrency=at_once,
                        conversations=count if number else 1,
                        seed=seed,
                        key=key if not target.command else "",
                    )
                    measured = run_client(job)
                    if number:
                        runs[target.name].append(figures(measured))
                    for each in measured["requests"]:
                        if each["error"]:
                            errors.setdefault(target.name, each["error"])
            times = against(runs)
            for target in targets:
                yield {
                    "workload": name,
                    "concurrency": at_once,
                    "target": target.name,
                    **summary(runs[target.name]),
                    "times": times[target.name],
                    "rounds": runs[target.name],
                    "error": errors.get(target.name, ""),
                }


def run_client(job: Any) -> dict[str, Any]:
    """What the client's process has measured of a job."""
    from dataclasses import asdict

    command = [sys.executable, "-m", "deployments.cli.bench.client"]
    done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"The client of the bench has failed: {done.stderr[-1500:]}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _document(targets: Sequence[Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from dataclasses import asdict

    from deployments.cli.bench.report import conditions

    return {"conditions": conditions(), "targets": [asdict(target) for target in targets], "results": list(results)}


def _first_error(results: Sequence[dict[str, Any]]) -> str:
    return next((f"{each['target']}: {each['error']}" for each in results if each["error"]), "")
