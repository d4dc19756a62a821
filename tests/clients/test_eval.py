"""`troupe eval` with lm_eval: a task of local data over two models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from tests.clients.conftest import client_python, finished

SUMS = [(12, 30, 42), (25, 31, 56), (40, 17, 57), (33, 29, 62), (18, 27, 45), (50, 26, 76)]


def test_lm_eval_over_two_models(folder_model: str, tmp_path: Path) -> None:
    rows = [
        {
            "q": f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n",
            "choices": [str(sum_), str(sum_ + 1)],
            "gold": 0,
        }
        for a, b, sum_ in SUMS
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices",
        "doc_to_target": "gold", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    command = [sys.executable, "-m", "deployments.cli.main", "eval", "--models", "folder", "--models", "agent"]
    command += ["--task", "lm_eval:sums", "--url", folder_model, "--lm-eval", f"--include_path {tmp_path}"]
    command += ["--python", str(client_python("lm_eval")), "--output", str(tmp_path / "out")]
    finished(command, 600)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [each["model"] for each in results] == ["folder", "agent"]
    for each in results:
        (score,) = each["scores"]
        assert (score["task"], score["metric"], score["samples"]) == ("sums", "acc", len(SUMS))
        assert score["value"] >= 5 / 6
        assert each["fingerprint"]["model"] == each["model"]
    assert "| folder | sums | acc | " in (tmp_path / "out" / "results.md").read_text()
