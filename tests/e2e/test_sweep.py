"""A sweep over models that the command serves itself: killed midway, started again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest
import requests
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.faults.paced import model

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = ROOT / "model_loaders" / "demo" / "weights"
ADAPTERS = ROOT / "tests" / "adapters"


class Sweep:
    """The command over the models `run7@…` of a configuration, with its results in a folder."""

    def __init__(self, folder: Path, args: dict[str, Any], *options: str) -> None:
        self.output = folder / "out"
        self.log = folder / "eval.log"
        application = {"name": "troupe", "route_prefix": "/", "import_path": "deployments.app:build_app", "args": args}
        (folder / "my.yaml").write_text(yaml.safe_dump({"applications": [application]}))
        self._command = [sys.executable, "-m", "deployments.cli.main", "eval", "--models", "run7@*"]
        self._command += ["--config", str(folder / "my.yaml"), *options, "--output"]

    def start(self, output: Path | None = None) -> subprocess.Popen[bytes]:
        """Start it, with a log of its own."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*self._command, str(output or self.output)],
                cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "RAY_ADDRESS": "", "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def finished(self, output: Path | None = None) -> str:
        """What it prints, and what it says beside that, when it runs to its end."""
        status = self.start(output).wait(1200)
        assert status == 0, self.log.read_text()
        return self.log.read_text()

    def killed(self, name: str, calls: int) -> None:
        """SIGKILL once a model has answered this number of calls; returns when nothing of it is left."""
        process = self.start()
        try:
            while Counter(call["model"] for call in self.calls())[name] < calls:
                assert process.poll() is None, self.log.read_text()
                time.sleep(0.1)  # reading all calls takes the processor from those that compute them
            started = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()
            process.wait()
        assert len(started) > 5, "Ray's processes too"
        assert psutil.wait_procs(started, timeout=90)[1] == []
        (url,) = {word for word in self.log.read_text().split() if word.startswith("http://")}
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=10)

    def calls(self) -> Iterator[dict[str, Any]]:
        """The recorded calls that were computed to their end; an answer from the record is not recorded."""
        for file in (self.output / "record").glob("calls-*.jsonl"):
            for line in file.read_text().splitlines(keepends=True):
                if line.endswith("\n") and (call := json.loads(line)).get("usage"):
                    yield call

    def results(self) -> dict[str, dict[str, Any]]:
        """What results.json has of each model."""
        found = json.loads((self.output / "results.json").read_text())["results"]
        return {each["model"]: each for each in found}


def check(sweep: Sweep, said: str, models: list[str]) -> None:
    """Nothing was computed twice, and table, results and drawing have every model once."""
    assert {call: times for call, times in Counter(each["call"] for each in sweep.calls()).items() if times > 1} == {}
    results = sweep.results()
    assert sorted(results) == models
    rows = [line.strip("| ").split(" | ") for line in (sweep.output / "results.md").read_text().splitlines()[2:]]
    assert [row[0] for row in rows[::2]] == models
    drawing = ElementTree.parse(sweep.output / "results.svg").getroot()
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == len(rows) == 2 * len(models)
    for name, row in zip(models, rows[::2], strict=True):
        (score, _) = results[name]["scores"]
        mark = results[name]["fingerprint"]["fingerprint"]
        assert row[2:] == ["score", f"{score['value']:.4f}", row[4], str(score["samples"]), mark]
        assert row[4] == f"{score['low']:.4f} to {score['high']:.4f}"
        assert [name, *row[1:4]] in [line.split()[:4] for line in said.splitlines()]
    assert len({each["fingerprint"]["fingerprint"] for each in results.values()}) == len(models)


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    paced = [
        model(f"run7@{step}", pace=0.001, tag=f"{step}", engine={"max_batch_size": 16}) for step in (100, 200, 300)
    ]
    sweep = Sweep(tmp_path, {"models": paced, "max_models_per_replica": 3}, "--episodes", "8")
    sweep.killed("run7@200", 40)
    answered = [call["call"] for call in sweep.calls()]
    said = sweep.finished()
    assert "run7@100: has a result" in said
    assert "run7@200: measuring" in said
    assert len(answered) < len(list(sweep.calls()))
    check(sweep, said, [f"run7@{step}" for step in (100, 200, 300)])


def checkpoints(folder: Path) -> dict[str, Any]:
    """Checkpoints of a run that forgets what it knew, and adapters, as the arguments of a server."""
    weights = load_file(WEIGHTS / "model.safetensors")
    for step, noise in ((100, 0.0), (200, 0.1), (300, 0.6)):
        place = shutil.copytree(WEIGHTS, folder / "run7" / f"checkpoint-{step}")
        draw = torch.Generator().manual_seed(step)
        changed = {
            key: value + noise * value.float().std() * torch.randn(value.shape, generator=draw)
            for key, value in weights.items()
        }
        changed = {key: value.to(weights[key].dtype).contiguous() for key, value in changed.items()}
        save_file(changed, place / "model.safetensors", metadata={"format": "pt"})
    for name in ("capitals", "one_more"):
        shutil.copytree(ADAPTERS / name, folder / "run7" / name)
    loader = {"loader": "model_loaders.auto:load_model", "kwargs": {"model_name": str(WEIGHTS), "dtype": "float32"}}
    return {
        "models": [{"id": "base", **loader, "engine": {"max_batch_size": 16}}],
        "folders": [{"glob": str(folder / "run7" / "*"), "id": "run7@{name}", "like": "base", "base": "base"}],
        "max_models_per_replica": 2,
    }


@pytest.mark.long
def test_checkpoints_and_adapters_have_the_scores_of_an_undisturbed_sweep(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, checkpoints(tmp_path), "--episodes", "8")
    models = [f"run7@{name}" for name in ("capitals", "checkpoint-100", "checkpoint-200", "checkpoint-300", "one_more")]
    sweep.killed("run7@checkpoint-100", 20)
    sweep.killed("run7@checkpoint-300", 20)
    said = sweep.finished()
    assert said.count(": has a result") >= 2
    check(sweep, said, models)
    scores = {name: each["scores"] for name, each in sweep.results().items()}
    other = tmp_path / "other"
    sweep.finished(other)
    sweep.output = other
    assert {name: each["scores"] for name, each in sweep.results().items()} == scores
    values = [scores[f"run7@checkpoint-{step}"][0]["value"] for step in (100, 200, 300)]
    assert values[0] > values[2]
