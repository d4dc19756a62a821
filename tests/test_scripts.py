"""What the scripts install, and when."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = """#!/bin/sh
case "$*" in
  *"pip install"*) for last; do :; done; echo "$last" >> "$(dirname "$0")/../installed" ;;
  *) echo "$PWD: $*" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of the repository with an environment whose Python only says what it is asked for."""
    root = tmp_path / "clone"
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / ".venv" / "pytriton").mkdir()
    for name in ("python", "ruff", "mypy"):
        program = root / ".venv" / "bin" / name
        program.write_text(PYTHON)
        program.chmod(0o755)
    return root


def run(root: Path, script: str, *arguments: str, folder: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("TROUPE_VENV", "PYTHONPATH")}
    done = subprocess.run(
        [root / "scripts" / script, *arguments],
        cwd=folder or root, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def installed(root: Path) -> list[str]:
    file = root / ".venv" / "installed"
    return [line.removeprefix(str(root)) for line in file.read_text().splitlines()] if file.exists() else []


def test_serving_installs_less_than_testing_which_holds_everything(clone: Path) -> None:
    for _ in range(2):
        run(clone, "serve")
        run(clone, "check_loader", "loader")
    assert installed(clone) == [""]
    for _ in range(2):
        run(clone, "test", "-k", "none")
        run(clone, "lint")
        run(clone, "serve")
    assert installed(clone) == ["", "[dev]"]
    with (clone / "pyproject.toml").open("a") as file:
        file.write("\n")
    run(clone, "serve")
    run(clone, "lint")
    assert installed(clone) == ["", "[dev]", "", "[dev]"]


def test_they_run_in_the_users_folder_and_testing_in_its_own(clone: Path, tmp_path: Path) -> None:
    """So that paths on the command line are relative to where it is typed."""
    main = "-m deployments.cli.main"
    assert run(clone, "serve", "my.yaml", folder=tmp_path) == f"{tmp_path}: {main} scripts/serve my.yaml\n"
    assert run(clone, "check_loader", "a:b", folder=tmp_path) == f"{tmp_path}: {main} check a:b\n"
    assert run(clone, "test", folder=tmp_path).startswith(f"{clone}: -m pytest")
