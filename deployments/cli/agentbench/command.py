"""`troupe agentbench`: AgentBench v0.2 over a model that a server or a configuration has."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli.endpoint.options import SOURCE, ApiKey, Url
from deployments.core.errors import ConfigError

if TYPE_CHECKING:
    from deployments.cli.agentbench.assignment import Assignment
    from deployments.cli.agentbench.interpreter import Interpreter
    from deployments.cli.endpoint.server import Endpoint


def agentbench(
    repo: Annotated[Path, typer.Option(help="Folder of AgentBench v0.2.")],
    config: Annotated[str | None, typer.Option(metavar=SOURCE, help="What to serve for the run.")] = None,
    url: Url = None,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Model to measure. Default: the only one.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks, with commas between them.")] = "avalon,ltp",
    workers: Annotated[int, typer.Option(min=1, help="Samples at the same time.")] = 32,
    output: Annotated[Path, typer.Option(help="Folder of the results. A run with the same folder goes on.")] = Path(
        "agentbench-results"
    ),
    python: Annotated[Path | None, typer.Option(help="Python that has the requirements of AgentBench.")] = None,
    api_key: ApiKey = None,
    fields: Annotated[str, typer.Option("--fields", help="Further fields of each request, as YAML or JSON.")] = "{}",
    retries: Annotated[int, typer.Option(min=0, help="Times that failed samples are run again.")] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 600,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds without the end of a sample, after which the run stops.")
    ] = 3600,
) -> None:
    """Run AgentBench v0.2: its controller, its task workers, and the model as their agent.

    \b
    troupe agentbench --config my.yaml --repo ../AgentBench --python agentbench-env/bin/python
    troupe agentbench --url http://127.0.0.1:8000 --repo ../AgentBench --tasks avalon,ltp,dbbench --workers 16

    The exit status is 0 if every task has a score, and AgentBench reads the errors of the server as they are meant.
    """
    from deployments.cli.agentbench.assignment import Assignment
    from deployments.cli.agentbench.interpreter import Interpreter
    from deployments.cli.agentbench.tasks import check_repo, mariadb, read_tasks
    from deployments.cli.endpoint.processes import ended_by_sigterm
    from deployments.cli.endpoint.server import endpoint

    repo, output = repo.absolute(), output.absolute()
    asked, more = read_tasks(tasks), _mapping(fields)
    check_repo(repo, asked)
    variables = mariadb(asked)
    interpreter = Interpreter(python, repo)
    interpreter.check(asked)
    (output / "logs").mkdir(parents=True, exist_ok=True)
    key = api_key or os.environ.get("OPENAI_API_KEY", "")
    with ended_by_sigterm(), endpoint(url, config, key, output / "logs" / "server.log") as server:
        chosen = _model(server, model)
        wrong = _checked_errors(server, chosen, interpreter)
        written = Assignment(
            repo=repo, server=server, model=chosen["id"], tasks=asked, fields=more, output=output, workers=workers
        )
        scored = _run(written, interpreter, variables, retries, timeout_s=timeout, patience_s=patience)
    raise typer.Exit(0 if scored and not wrong else 1)


def _mapping(fields: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(fields)
    except yaml.YAMLError as error:
        raise ConfigError(f"--fields is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--fields {fields!r} should be a mapping, such as {{max_tokens: 256}}.")
    return found


def _model(server: Endpoint, name: str | None) -> dict[str, Any]:
    """The model that is measured, as `/v1/models` lists it."""
    listed = server.models()
    if name is None:
        alone = [each for each in listed if each.get("root", each["id"]) == each["id"] and not each.get("parent")]
        if len(alone) != 1:
            raise ConfigError(f"Name the model with --model; there are {', '.join(each['id'] for each in listed)}.")
        return alone[0]
    for each in listed:
        if each["id"] == name:
            return each
    raise ConfigError(f"--model {name!r}: there are {', '.join(each['id'] for each in listed)}.")


def _checked_errors(server: Endpoint, model: dict[str, Any], interpreter: Interpreter) -> list[str]:
    """Print, and return, what AgentBench would misread of the server's errors."""
    from deployments.cli.agentbench.error_texts import faults

    wrong = faults(server, model["id"], model.get("max_model_len"), interpreter.overflows)
    print("\n".join(wrong) or "AgentBench reads the errors of the server as they are meant", file=sys.stderr)
    return wrong


def _run(asked: Assignment, interpreter: Interpreter, variables: dict[str, str], retries: int, **times: float) -> bool:
    """Run all samples, print the scores, and return whether every task has one."""
    from deployments.cli.agentbench.run import Run
    from deployments.cli.agentbench.scores import Progress, overall, report

    def scored() -> bool:
        return all(overall(asked, task) is not None for task in asked.tasks)

    with Run(asked, interpreter, variables, **times) as run:
        samples = run.start()
        progress = Progress(asked, samples)
        print(
            f"{asked.model}: {progress.line()}, {asked.workers} at a time; results are in {asked.output}",
            file=sys.stderr,
        )
        for attempt in range(1 + retries):
            if attempt:
                print(f"Running failed samples again: {progress.line()}", file=sys.stderr)
            run.assign(progress)
            if scored():
                break
    for task in asked.tasks:
        print("\n".join(report(asked, task, samples[task.name])))
    return scored()
