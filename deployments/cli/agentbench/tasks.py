"""The tasks of AgentBench v0.2 that run without docker, and what each needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deployments.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of task.

    Attributes:
        split: that its short name stands for.
        config: file with its definition, in AgentBench's folder.
        data: file with the samples of a split, likewise.
        module: that must be importable.
        packages: as `pip install` takes them, by the module that each installs.
        capacity: samples of one worker process at a time. A game of avalon keeps its state in a class, and a MariaDB
            has the tables of one sample: a process computes one of these.
        most: processes.
    """

    split: str
    config: str
    data: Mapping[str, str]
    module: str
    packages: Mapping[str, str] = field(default_factory=dict)
    capacity: int = 1
    most: int = 64


COMMON = {
    "pydantic": "pydantic<2",
    "requests": "requests",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
    "aiohttp": "aiohttp",
    "uvicorn": "uvicorn",
    "fastapi": "fastapi<0.116",
    "numpy": "numpy<2",
}
"""What every task needs, as `Kind.packages`."""

KINDS = {
    "avalon": Kind(
        "avalon-dev-single",
        "configs/tasks/avalon.yaml",
        {"avalon-dev-single": "data/avalon/dev.json", "avalon-dev-naive": "data/avalon/dev.json"},
        "src.server.tasks.avalon",
    ),
    "ltp": Kind(
        "ltp-dev",
        "configs/tasks/ltp.yaml",
        {"ltp-dev": "data/lateralthinkingpuzzle/dev.xlsx", "ltp-std": "data/lateralthinkingpuzzle/standard.xlsx"},
        "src.server.tasks.ltp.task",
        {"pandas": "pandas", "openpyxl": "openpyxl", "nltk": "nltk"},
        capacity=8,
    ),
    "dbbench": Kind(
        "dbbench-dev",
        "configs/tasks/dbbench.yaml",
        {"dbbench-dev": "data/dbbench/dev.jsonl", "dbbench-std": "data/dbbench/standard.jsonl"},
        "src.server.tasks.dbbench",
        {"mysql.connector": "mysql-connector-python==8.0.33"},
        most=8,
    ),
}

_NEED = {
    "os": "docker", "kg": "a Freebase server", "alfworld": "docker, or the games of alfworld", "card_game": "docker",
    "mind2web": "docker", "webshop": "docker",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """A task to run: its name in AgentBench, and its kind."""

    name: str
    kind: Kind

    def processes(self, repo: Path, workers: int) -> int:
        """How many worker processes serve `workers` samples at a time."""
        wanted = -(-workers // self.kind.capacity)
        samples = _samples(repo / self.kind.data[self.name])
        return min(wanted, self.kind.most, *([] if samples is None else [-(-samples // self.kind.capacity)]))


def _samples(data: Path) -> int | None:
    if data.suffix == ".json":
        return len(json.loads(data.read_text(encoding="utf-8")))
    return len(data.read_text(encoding="utf-8").splitlines()) if data.suffix == ".jsonl" else None


def read_tasks(text: str) -> list[Task]:
    """Tasks as the command line has them: short names or AgentBench's own, with commas between them.

    Raises:
        ConfigError: a task is not known, or needs what this command does not have.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError("--tasks names no task; write --tasks avalon,ltp.")
    return [_task(name) for name in names]


def _task(name: str) -> Task:
    kind = KINDS.get(name)
    if kind is not None:
        return Task(kind.split, kind)
    for each in KINDS.values():
        if name in each.data:
            return Task(name, each)
    short = next((short for short in _NEED if name == short or name.startswith(f"{short}-")), None)
    known = ", ".join([*KINDS, *(split for each in KINDS.values() for split in each.data)])
    if short is not None:
        raise ConfigError(f"--tasks {name}: this task needs {_NEED[short]}, which troupe agentbench does not start. "
                          f"It runs {known}.")  # fmt: skip
    raise ConfigError(f"--tasks {name!r}: there are {known}.")


def check_repo(repo: Path, tasks: Sequence[Task]) -> None:
    """Refuse a folder that is not AgentBench v0.2.

    Raises:
        ConfigError: it names what is missing.
    """
    if not repo.is_dir():
        raise ConfigError(f"--repo {repo}: there is no such folder. Clone https://github.com/THUDM/AgentBench there.")
    files = ["src/assigner.py", "src/server/task_controller.py", "src/server/task_worker.py"]
    files += [file for task in tasks for file in (task.kind.config, task.kind.data[task.name])]
    for file in files:
        if not (repo / file).is_file():
            raise ConfigError(
                f"--repo {repo}: {file} is missing, so this is not AgentBench v0.2. Its newer versions have another "
                "controller: check out the tag v0.2 (git checkout v0.2)."
            )


def mariadb(tasks: Sequence[Task]) -> dict[str, str]:
    """Variables that name the programs of MariaDB on this machine, if a task needs them.

    Raises:
        ConfigError: it is not installed.
    """
    if not any(task.kind is KINDS["dbbench"] for task in tasks):
        return {}
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
    server = shutil.which("mariadbd", path=places) or shutil.which("mysqld", path=places)
    install = shutil.which("mariadb-install-db", path=places) or shutil.which("mysql_install_db", path=places)
    needed = {
        "mariadbd": server,
        "mariadb-install-db": install,
        "my_print_defaults": shutil.which("my_print_defaults", path=places),
    }
    lacking = [name for name, program in needed.items() if program is None]
    if server is None or install is None or lacking:
        raise ConfigError(
            f"dbbench needs a MariaDB of this machine, and {lacking[0]} is not installed (apt-get install "
            "mariadb-server-core mariadb-client-core). Leave dbbench out of --tasks to run the others."
        )
    version = subprocess.run([server, "--version"], capture_output=True, text=True, check=False).stdout
    if "MariaDB" not in version:
        raise ConfigError(f"dbbench needs MariaDB; {server} is {version.strip() or 'another server'}.")
    return {"TROUPE_MARIADBD": server, "TROUPE_MARIADB_INSTALL": install}
