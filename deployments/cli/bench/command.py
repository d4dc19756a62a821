"""`troupe bench`: workloads against OpenAI APIs and peers that it starts, in turns, as medians of several rounds."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deployments.cli.bench.workloads import WORKLOADS
from deployments.core.errors import ConfigError

SHORT = ("short", "words300", "agent6")
"""Workloads if none is named."""
AT_ONCE = (1, 16)
"""Conversations at a time if no number is given."""


def bench(
    url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]URL", help="A running server, such as http://127.0.0.1:8000/v1; can be given several times."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PEER[@PROGRAM] [OPTIONS]",
            help="A server to start for --model, with further options of its own; can be given several times.",
        ),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Start every peer that is installed.")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of the model at each URL, several take turns; folder or name of the weights for peers. "
            "Default: demo."
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="What is asked; can be given several times. Default: short, words300, agent6."),
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Conversations at a time; can be given several times. Default: 1, 16."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each with prompts of its own.")] = 3,
    conversations: Annotated[
        int | None, typer.Option(min=1, help="Conversations of a run. Default: twice those at a time, at least 4.")
    ] = None,
    gguf: Annotated[str, typer.Option(help="The weights for llama.cpp.")] = "",
    ct2: Annotated[str, typer.Option(help="The weights for CTranslate2, a folder.")] = "",
    key_variable: Annotated[
        str, typer.Option(help="Environment variable with the API key for every URL.")
    ] = "OPENAI_API_KEY",
    as_json: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
    as_svg: Annotated[Path | None, typer.Option("--svg", help="File for a drawing.")] = None,
    shown: Annotated[
        Path | None, typer.Option("--from", help="Show the figures of a --json file again, and measure nothing.")
    ] = None,
    gate: Annotated[
        Path | None, typer.Option(help="A --json file: exit status 1 if a ratio is lower than there.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Share by which a ratio may be lower, at least.")] = 0.1,
    profile: Annotated[
        Path | None, typer.Option(help="Folder for a profile of the first server, made with py-spy.")
    ] = None,
) -> None:
    """Measure servers with an OpenAI API, side by side.

    In every round each server gets the same prompts, in an order that changes from round to round, from a client in a
    process of its own. Figures are medians over the rounds, after one that does not count.

    \b
    troupe bench --url http://127.0.0.1:8000/v1 --model demo
    troupe bench --peer troupe --peer transformers-cb --model ./my-model --json bench.json --svg bench.svg
    troupe bench --peers --model ./my-model --gguf my-model.gguf
    troupe bench --from bench.json --svg bench.svg
    """
    from deployments.cli.bench.gate import saved, slower
    from deployments.cli.bench.report import matrix, table
    from deployments.cli.bench.run import Wish, run

    baseline = None if gate is None else saved(gate)["results"]
    if shown is not None:
        document = saved(shown)
    else:
        wish = Wish(
            urls=url or (),
            peers=peer or (),
            every_peer=peers,
            models=model or ("demo",),
            workloads=_checked(workload or SHORT),
            at_once=concurrency or AT_ONCE,
            rounds=rounds,
            conversations=conversations,
            gguf=gguf,
            ct2=ct2,
            key=os.environ.get(key_variable, ""),
            profile=profile,
        )
        document = run(wish)
        if as_json is not None:
            as_json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    results = document["results"]
    if as_svg is not None:
        from deployments.cli.bench.plot import svg

        as_svg.write_text(svg(results), encoding="utf-8")
    print(f"{table(results)}\n\n{matrix(results)}")
    failed = _failed(results) if shown is None else False
    if baseline is not None:
        lines, compared = slower(results, baseline, tolerance)
        print(f"\n{compared} ratios compared with {gate}; lower by more than noise: {len(lines)}", *lines, sep="\n")
        failed = failed or bool(lines) or not compared
    if document.get("interrupted") and shown is None:
        raise typer.Exit(130)
    if failed:
        raise typer.Exit(1)


def _checked(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in WORKLOADS:
            raise ConfigError(f"--workload {name!r}: there are {', '.join(WORKLOADS)}.")
    return names


def _failed(results: Sequence[Mapping[str, Any]]) -> bool:
    """Say which servers refuse a workload, and whether requests failed: those of the first server always count."""
    for each in results:
        if each.get("refused"):
            print(f"{each['target']} does not answer {each['workload']}: {each['error']}", file=sys.stderr)
    broken = [
        each
        for each in results
        if each.get("errors") or (each.get("refused") and each["target"] == results[0]["target"])
    ]
    if count := sum(each.get("errors", 0) for each in broken):
        first = next(each for each in broken if each.get("errors"))
        print(f"{count:.0f} requests failed; the first: {first['target']}: {first['error']}", file=sys.stderr)
    return bool(broken)
