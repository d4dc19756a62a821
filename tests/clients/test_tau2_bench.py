"""tau2-bench in the folder that TAU2_BENCH_REPO names: an agent and a user of one model that knows what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import client_python, run_shell
from tests.clients.page import block
from tests.serving import serving

REPO = os.environ.get("TAU2_BENCH_REPO", "")
TASKS = Path("data/tau2/domains/mock/tasks.json")
IDS = ["create_task_1", "create_task_1_with_env_assertions", "update_task_1", "impossible_task_1"]


def python_3_12() -> str | None:
    """A Python 3.12 of this machine that runs."""
    installed = sorted((Path.home() / ".pyenv" / "versions").glob("3.12.*/bin/python3.12"))
    for program in (shutil.which("python3.12"), *map(str, installed)):
        if program and subprocess.run([program, "-c", ""], capture_output=True, check=False).returncode == 0:
            return program
    return None


PYTHON = python_3_12() if REPO else None

pytestmark = [
    pytest.mark.skipif(not REPO, reason="TAU2_BENCH_REPO names no folder of tau2-bench"),
    pytest.mark.skipif(bool(REPO) and PYTHON is None, reason="tau2-bench needs Python 3.12, which is not installed"),
]


@pytest.fixture(scope="module")
def python() -> Path:
    return client_python("tau2_bench", ["-e", REPO], PYTHON)


@pytest.fixture(scope="module")
def oracle(cluster: str) -> Iterator[str]:
    kwargs = {"benchmark": "tau2", "data": str(Path(REPO) / TASKS)}
    model = {"id": "oracle", "loader": "tests.clients.oracle:load_model", "kwargs": kwargs}
    with serving(cluster, {"models": [{**model, "api": {"tool_parser": "hermes"}}]}) as url:
        yield url


def run(python: Path, folder: Path, url: str, model: str, options: str) -> list[dict[str, Any]]:
    """The simulations of a run, after the command of docs/clients.md."""
    (folder / "data").mkdir()
    (folder / "data" / "tau2").symlink_to(Path(REPO).resolve() / "data" / "tau2")
    changes = {
        "git clone --branch v1.0.1 https://github.com/sierra-research/": "true ",
        "python3.12 -m venv tau2-env\nsource tau2-env/bin/activate\n": "",
        "http://127.0.0.1:8000": url,
        "my-checkpoint": model,
        "--domain mock": f"--domain mock {options}",
    }
    exports = f"export TAU2_DATA_DIR={folder / 'data'} LITELLM_LOCAL_MODEL_COST_MAP=True\n"
    run_shell(python, exports + block("tau2_bench", "bash", 0, changes), folder)
    (file,) = (folder / "data" / "simulations").glob("*/results.json")
    found: list[dict[str, Any]] = json.loads(file.read_text())["simulations"]
    return found


def test_right_actions_have_every_point(oracle: str, python: Path, tmp_path: Path) -> None:
    simulations = run(python, tmp_path, oracle, "oracle", f"--task-ids {' '.join(IDS)}")
    rewards = {each["task_id"]: each["reward_info"]["reward"] for each in simulations}
    assert rewards == dict.fromkeys(IDS, 1.0)
