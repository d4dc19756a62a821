"""The benchmarks `lm_eval:TASK`: lm-evaluation-harness as a program, over the server's completions."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deployments.cli.endpoint.processes import end_of, running
from deployments.cli.endpoint.server import Endpoint
from deployments.cli.sweep.models import quoted, resume_headers
from deployments.cli.sweep.results import Score, Z
from deployments.core.errors import ConfigError

PREFIX = "lm_eval:"
REQUIREMENT = "lm_eval[api]==0.4.13"


def check(python: Path) -> None:
    """Refuse a Python without lm_eval.

    Raises:
        ConfigError: it says how to install it.
    """
    try:
        command = [str(python), "-c", "import lm_eval, aiohttp, tenacity"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"--python {python} cannot be run: {error}") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it ends without a message"])[-1]
        raise ConfigError(
            f"{python} cannot import lm_eval ({said}). Run:\n  python3 -m venv lm-eval-env\n"
            f"  lm-eval-env/bin/pip install '{REQUIREMENT}'\nand add --python lm-eval-env/bin/python."
        )


def evaluate(
    server: Endpoint, model: str, tasks: str, *, python: Path, workers: int, options: Sequence[str], folder: Path
) -> list[Score]:
    """Every metric of the tasks.

    Args:
        tasks: as lm_eval has them, with commas between them.
        options: further ones of `lm_eval run`.
        folder: for its files.

    Raises:
        ConfigError: it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "lm_eval.log"
    log.unlink(missing_ok=True)
    for old in folder.glob("results/**/results_*.json"):
        old.unlink()
    command = [str(python), "-m", "lm_eval", "run", *_model(server, model, workers, options)]
    command += ["--tasks", *tasks.split(","), "--output_path", str(folder / "results"), *options]
    key = {"OPENAI_API_KEY": server.key or os.environ.get("OPENAI_API_KEY", "none")}
    with running(command, log, environment={"TOKENIZERS_PARALLELISM": "false", **key}) as process:
        process.wait()
    written = sorted(folder.glob("results/**/results_*.json"))
    if process.returncode or not written:
        raise ConfigError(f"lm_eval has failed: {shlex.join(command)}\nThe end of {log}:\n{end_of(log)}")
    return list(scores(json.loads(written[-1].read_text(encoding="utf-8"))))


def _model(server: Endpoint, model: str, workers: int, options: Sequence[str]) -> list[str]:
    """The options that name the server: its completions, with its own tokenizer."""
    arguments: dict[str, Any] = {
        "model": model,
        "base_url": f"{server.url}/models/{quoted(model)}/v1/completions",
        "num_concurrent": workers,
        "tokenizer_backend": "remote",
        "header": {**server.authorization, **resume_headers(server, model)},
    }
    window = next((each.get("max_model_len") for each in server.models() if each["id"] == model), None)
    if window is not None:
        arguments["max_length"] = window
    return ["--model", "local-completions", "--model_args", json.dumps(arguments)]


def scores(document: Mapping[str, Any]) -> Iterator[Score]:
    """The scores in lm_eval's results, each with the interval of its standard error."""
    counts = document.get("n-samples") or {}
    for task, metrics in document["results"].items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, (int, float)) or isinstance(value, bool) or metric.endswith("_stderr") or not kind:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            half = Z * error if isinstance(error, (int, float)) else None
            yield Score(
                task=task,
                metric=metric if kind == "none" else f"{metric}, {kind}",
                value=float(value),
                low=None if half is None else value - half,
                high=None if half is None else value + half,
                samples=(counts.get(task) or {}).get("effective"),
            )


def default_python() -> Path:
    """The Python that runs this."""
    return Path(sys.executable)
