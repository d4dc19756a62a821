"""`troupe eval`: one benchmark over several models of a server."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli.endpoint.options import SOURCE, ApiKey, AtOnce, Url
from deployments.core.errors import ConfigError

if TYPE_CHECKING:
    from deployments.cli.endpoint.server import Endpoint
    from deployments.cli.sweep.results import Result, ResultFile, Score

    Benchmark = Callable[[Endpoint, str], list[Score]]


def evaluate(
    models: Annotated[
        list[str],
        typer.Option(metavar="ID | GLOB", help="Models to measure, such as 'run7@*'; can be given several times."),
    ],
    task: Annotated[
        str, typer.Option(metavar="agent:worlds | lm_eval:TASK[,TASK]", help="Benchmark.")
    ] = "agent:worlds",
    url: Url = None,
    config: Annotated[str | None, typer.Option(metavar=SOURCE, help="What to serve for the sweep.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results. A sweep with the same folder goes on.")] = Path(
        "eval-results"
    ),
    episodes: Annotated[int, typer.Option(min=1, help="Worlds of agent:worlds.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the worlds.")] = 0,
    workers: AtOnce = 16,
    lm_eval: Annotated[str, typer.Option("--lm-eval", help="Further options of lm_eval, as one text.")] = "",
    python: Annotated[Path | None, typer.Option(help="Python that has lm_eval.")] = None,
    api_key: ApiKey = None,
) -> None:
    """Run one benchmark over several models of a server: checkpoints, variants, adapters.

    \b
    troupe eval --models 'run7@*' --task lm_eval:hellaswag --url http://127.0.0.1:8000 --python lm-eval-env/bin/python
    troupe eval --models '*' --task agent:worlds --config my.yaml

    The folder of the results gets results.json, results.md and results.svg. Models that have a result are not measured
    again, and with --config no call is computed again. The exit status is 1 if a model has no score.
    """
    from deployments.cli.endpoint.processes import ended_by_sigterm
    from deployments.cli.endpoint.server import endpoint
    from deployments.cli.sweep.models import matching
    from deployments.cli.sweep.results import ResultFile

    output = output.absolute()
    options = shlex.split(lm_eval)
    settings: dict[str, Any] = {"task": task}
    settings |= {"episodes": episodes, "seed": seed} if task == "agent:worlds" else {"lm_eval": options}
    benchmark = _benchmark(task, episodes, seed, workers, options, python, output)
    output.mkdir(parents=True, exist_ok=True)
    file = ResultFile(output / "results.json", settings)
    key = api_key or os.environ.get("OPENAI_API_KEY", "")
    recorded = [] if config is None else _recorded(config, output / "record")
    with ended_by_sigterm(), endpoint(url, config, key, output / "server.log", recorded) as server:
        try:
            results = [_measured(server, model, benchmark, file) for model in matching(server, models)]
        except KeyboardInterrupt:
            print(f"\nInterrupted. The same command goes on with the models that {output} lacks.", file=sys.stderr)
            raise
    _write(results, output)
    raise typer.Exit(1 if any(result.error for result in results) else 0)


def _recorded(config: str, folder: Path) -> list[str]:
    """The options of a server that records its calls; none if its configuration says itself whether it does."""
    import yaml

    from deployments.config.app import IMPORT_PATH
    from deployments.config.yaml_text import read_yaml

    apis: list[Any] = [{}]
    if config.endswith((".yaml", ".yml")):
        try:
            served = read_yaml(Path(config).expanduser().read_text(encoding="utf-8"))["applications"]
            apis = [(app.get("args") or {}).get("api") or {} for app in served if app["import_path"] == IMPORT_PATH]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
            return []  # `troupe serve` says what is wrong
    return ["--record-dir", str(folder)] if len(apis) == 1 and "record_dir" not in apis[0] else []


def _benchmark(
    task: str, episodes: int, seed: int, workers: int, options: list[str], python: Path | None, output: Path
) -> Benchmark:
    """What gives the scores of a model."""
    from deployments.cli.sweep import lm_eval, worlds

    if task == worlds.NAME:
        return lambda server, model: worlds.play(
            server, model, episodes=episodes, workers=workers, seed=seed, show=_shown(model, episodes)
        )
    names = task.removeprefix(lm_eval.PREFIX)
    if names == task or not names:
        raise ConfigError(f"--task {task!r}: there are agent:worlds and lm_eval:TASK, such as lm_eval:hellaswag.")
    program = lm_eval.default_python() if python is None else python.absolute()
    lm_eval.check(program)
    return lambda server, model: lm_eval.evaluate(
        server, model, names, python=program, workers=workers, options=options, folder=output / _folder(model)
    )


def _folder(model: str) -> str:
    return "".join(each if each.isalnum() or each in "-._+@" else "_" for each in model)


def _shown(model: str, episodes: int) -> Callable[[int], None]:
    """Shows how many episodes have ended, at every tenth of them."""
    step = max(1, episodes // 10)

    def show(ended: int) -> None:
        if ended % step == 0:
            print(f"{model}: {ended} of {episodes}", file=sys.stderr)

    return show


def _measured(server: Endpoint, model: str, benchmark: Benchmark, file: ResultFile) -> Result:
    """The result of a model: the one that the file has, or a new one."""
    from deployments.cli.sweep.models import fingerprint
    from deployments.cli.sweep.results import Result

    began, found = time.monotonic(), None
    try:
        found = fingerprint(server, model)
        mark = None if found is None else str(found["fingerprint"])
        if (finished := file.finished(model, mark)) is not None:
            print(f"{model}: has a result", file=sys.stderr)
            return finished
        print(f"{model}: measuring", file=sys.stderr)
        scores = benchmark(server, model)
        result = Result(model=model, fingerprint=found, scores=scores, seconds=round(time.monotonic() - began, 3))
    except ConfigError as error:
        print(f"{model}: failed: {error}", file=sys.stderr)
        result = Result(model=model, fingerprint=found, error=str(error))
    file.add(result)
    return result


def _write(results: list[Result], output: Path) -> None:
    """Print the table, and write it and the drawing."""
    from deployments.cli.sweep.report import markdown, svg, table

    (output / "results.md").write_text(markdown(results), encoding="utf-8")
    (output / "results.svg").write_text(svg(results), encoding="utf-8")
    print(table(results))
    print(f"results.json, results.md and results.svg are in {output}", file=sys.stderr)
