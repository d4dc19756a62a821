"""evalplus writes programs for problems of ours: greedy ones, and several samples in a request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.conftest import client_python, run_shell
from tests.clients.page import block

SAMPLED = "--n_samples 3 --bs 3 --temperature 0.8"


@pytest.mark.parametrize(("sampling", "each"), [("--greedy", 1), (SAMPLED, 3)], ids=["greedy", "sampled"])
def test_programs(folder_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: str, each: int) -> None:
    problems = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def add{number}(a, b):\n    """Add two numbers and {number}."""\n',
            "canonical_solution": f"    return a + b + {number}\n",
            "entry_point": f"add{number}",
            "test": "",
            "contract": "",
            "base_input": [[1, 2]],
            "plus_input": [[3, 4]],
            "atol": 0,
        }
        for number in range(2)
    ]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(data))
    changes = {"http://127.0.0.1:8000": folder_model, "my-checkpoint": "folder", "--greedy": sampling}
    run_shell(client_python("evalplus"), block("evalplus", "bash", 0, changes), tmp_path)
    (file,) = (path for path in tmp_path.glob("results/humaneval/*.jsonl") if ".raw" not in path.name)
    written = [json.loads(line)["task_id"] for line in file.read_text().splitlines()]
    assert sorted(written) == sorted(problem["task_id"] for problem in problems for _ in range(each))
