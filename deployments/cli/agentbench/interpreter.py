"""The Python that has AgentBench's requirements."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.cli.agentbench.tasks import COMMON, Task
from deployments.core.errors import ConfigError

BOOTSTRAP = Path(__file__).parent / "bootstrap.py"
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
_CHECK_S = 120.0


class Interpreter:
    """A Python that runs parts of AgentBench.

    Args:
        python: its program; None for the one that runs this.
        repo: AgentBench's folder.

    Raises:
        ConfigError: there is no such program.
    """

    def __init__(self, python: Path | None, repo: Path) -> None:
        self.python = Path(sys.executable) if python is None else python.absolute()
        self.repo = repo
        if not self.python.is_file():
            raise ConfigError(f"--python {python}: there is no such program.")

    def part(self, *arguments: str) -> list[str]:
        """The command that runs a part of AgentBench; see bootstrap.py."""
        return [str(self.python), str(BOOTSTRAP), *arguments]

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse a Python that lacks what the tasks need.

        Raises:
            ConfigError: it names what is missing, and how to install it.
        """
        packages = {**COMMON, **{module: name for task in tasks for module, name in task.kind.packages.items()}}
        modules = ["src.assigner", "src.server.task_controller", *(task.kind.module for task in tasks)]
        found = self._ask("missing", *packages, *modules)
        if lacking := [name for module, name in packages.items() if module in found["missing"]]:
            self._refuse(", ".join(lacking), list(packages.values()))
        for module, error in found["missing"].items():
            if not found["pydantic"].startswith("1."):
                self._refuse(f"{COMMON['pydantic']} (it has {found['pydantic']})", list(packages.values()))
            raise ConfigError(f"{self.python} cannot import {module} of {self.repo}: {error}")

    def overflows(self, texts: Sequence[str]) -> list[bool]:
        """For each text of an error, whether AgentBench takes it for an overflow of the context."""
        found: list[bool] = self._ask("classify", given=json.dumps(texts))
        return found

    def _refuse(self, lacking: str, packages: Sequence[str]) -> None:
        named = " ".join(f"'{name}'" for name in packages)
        if self.python == Path(sys.executable):
            here = "python3 -m venv agentbench-env"
            fix = f"{here}\n  agentbench-env/bin/pip install {named}\nand add --python agentbench-env/bin/python."
        else:
            fix = f"{self.python} -m pip install {named}"
        raise ConfigError(f"{self.python} lacks what AgentBench needs: {lacking}. Run:\n  {fix}")

    def _ask(self, *arguments: str, given: str = "") -> Any:
        try:
            done = subprocess.run(
                self.part(*arguments),
                input=given,
                cwd=self.repo,
                capture_output=True,
                text=True,
                timeout=_CHECK_S,
                check=False,
            )
            return json.loads(done.stdout.splitlines()[-1])
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"--python {self.python} cannot be run: {error}") from None
        except (ValueError, IndexError):
            raise ConfigError(f"{self.python} has failed in {self.repo}: {done.stderr[-1500:]}") from None
