"""`troupe eval` with lm_eval: a task of local data over two models."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import yaml

from tests.clients.conftest import WEIGHTS, client_python, finished
from tests.e2e.test_sweep import Sweep


def write_task(folder: Path, count: int) -> None:
    """The task `sums`: which of two numbers is the sum."""
    rows = [
        {
            "q": f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n",
            "choices": [str(a + b), str(a + b + 1)],
            "gold": 0,
        }
        for a, b in ((12 + 7 * i % 41, 17 + 5 * i % 37) for i in range(count))
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices",
        "doc_to_target": "gold", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))


def test_lm_eval_over_two_models(folder_model: str, tmp_path: Path) -> None:
    write_task(tmp_path, 6)
    command = [sys.executable, "-m", "deployments.cli.main", "eval", "--models", "folder", "--models", "agent"]
    command += ["--task", "lm_eval:sums", "--url", folder_model, "--lm-eval", f"--include_path {tmp_path}"]
    command += ["--python", str(client_python("lm_eval")), "--output", str(tmp_path / "out")]
    finished(command, 600)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [each["model"] for each in results] == ["folder", "agent"]
    for each in results:
        (score,) = each["scores"]
        assert (score["task"], score["metric"], score["samples"]) == ("sums", "acc", 6)
        assert score["value"] >= 5 / 6
        assert each["fingerprint"]["model"] == each["model"]
    assert "| folder | sums | acc | " in (tmp_path / "out" / "results.md").read_text()


def test_a_killed_sweep_computes_no_call_again(tmp_path: Path) -> None:
    """lm_eval, which knows nothing of the command that has started it, ends with it too."""
    write_task(tmp_path, 80)
    kwargs = {"model_name": str(WEIGHTS), "dtype": "float32"}
    engines = {"run7@one": {"max_batch_size": 8}, "run7@two": {"max_batch_size": 8, "deterministic": True}}
    models = [
        {"id": name, "loader": "model_loaders.auto:load_model", "kwargs": kwargs, "engine": engine}
        for name, engine in engines.items()
    ]
    options = ["--task", "lm_eval:sums", "--lm-eval", f"--include_path {tmp_path}", "--workers", "2"]
    options += ["--python", str(client_python("lm_eval"))]
    sweep = Sweep(tmp_path, {"models": models, "max_models_per_replica": 2}, *options)
    sweep.killed("run7@two", 40)
    before = len(list(sweep.calls()))
    assert "run7@one: has a result" in sweep.finished()
    calls = Counter(call["call"] for call in sweep.calls())
    assert before < calls.total()
    assert set(calls.values()) == {1}
    assert [each["scores"][0]["samples"] for each in sweep.results().values()] == [80, 80]
