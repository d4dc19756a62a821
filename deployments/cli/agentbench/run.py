"""A run of AgentBench: its controller, task workers and assigner as processes, watched until the last sample ends."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.cli.agentbench.assignment import Assignment
from deployments.cli.agentbench.interpreter import ENVIRONMENT, Interpreter
from deployments.cli.agentbench.scores import Progress
from deployments.cli.endpoint.processes import ask_to_end, end_of, running
from deployments.core.errors import ConfigError

_START_S = 300.0
_SHOW_S = 10.0


@dataclass(frozen=True, slots=True)
class Part:
    """A process of a run, and the file of what it prints."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Run:
    """The processes of a run. A context manager: at its end all are stopped.

    Args:
        variables: of the processes, beside those of every run.
        timeout_s: of a request of the agent.
        patience_s: without the end of a sample, after which the run is given up.
    """

    def __init__(
        self,
        asked: Assignment,
        python: Interpreter,
        variables: Mapping[str, str],
        *,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        self._asked = asked
        self._python = python
        self._environment = {**ENVIRONMENT, **variables, "TROUPE_TIMEOUT_S": str(timeout_s)}
        self._patience_s = patience_s
        self._parts: list[Part] = []
        self._address = ""
        self._stack = contextlib.ExitStack()
        self._logs = asked.output / "logs"

    def __enter__(self) -> Run:
        self._logs.mkdir(parents=True, exist_ok=True)
        # The data of a worker that is killed; the path of a MariaDB's socket must be short.
        data = tempfile.TemporaryDirectory(prefix="ab-", ignore_cleanup_errors=True)
        self._environment["TMPDIR"] = self._stack.enter_context(data)
        return self

    def __exit__(self, *_: object) -> None:
        for part in self._parts:  # at once; then each is waited for
            ask_to_end(part.process)
        self._stack.close()

    def start(self) -> dict[str, int]:
        """Start the controller and the workers; the number of samples of each task.

        Raises:
            ConfigError: one of them ends, or does not begin in time.
        """
        self._address = self._part("controller", lambda _: self._python.part("controller"))
        self._asked.write(self._address)
        self._until(lambda: self._workers() is not None, "The controller of AgentBench does not answer")
        expected = {}
        for task in self._asked.tasks:
            expected[task.name] = task.processes(self._asked.repo, self._asked.workers)
            for number in range(expected[task.name]):
                self._worker(task.name, number)
        print(f"Starting {sum(expected.values())} task workers of AgentBench", file=sys.stderr)

        def registered() -> bool:
            listed = self._workers() or {}
            return all(len(listed.get(name, {"workers": ()})["workers"]) >= count for name, count in expected.items())

        self._until(registered, "The task workers of AgentBench do not all register")
        return {name: len(task["indices"]) for name, task in (self._workers() or {}).items()}

    def assign(self, progress: Progress) -> None:
        """Run the samples that have no result yet.

        Raises:
            ConfigError: a process has ended, or no sample ends for too long.
        """
        command = self._python.part("run", "src.assigner", "--config", str(self._asked.files / "assignment.yaml"))
        log = self._logs / "assigner.log"
        with running(command, log, folder=self._asked.repo, environment=self._environment) as assigner:
            ended = shown = time.monotonic()
            while assigner.poll() is None:
                self._check()
                if progress.read():
                    ended = time.monotonic()
                if time.monotonic() - ended > self._patience_s:
                    raise ConfigError(f"No sample has ended for {self._patience_s:g} s. The logs are in {self._logs}.")
                if progress.changed and time.monotonic() - shown >= _SHOW_S:
                    shown = time.monotonic()
                    print(progress.line(), file=sys.stderr)
                time.sleep(0.2)
            progress.read()
        if assigner.returncode != 0:
            raise ConfigError(f"The assigner of AgentBench has failed; the end of {log}:\n{end_of(log)}")

    def _worker(self, task: str, number: int) -> None:
        tasks = str(self._asked.files / "tasks.yaml")

        def command(address: str) -> list[str]:
            options = ["--config", tasks, "--self", address, "--controller", self._address]
            return self._python.part("run", "src.server.task_worker", task, *options)

        self._part(f"{task}-{number}", command)

    def _part(self, name: str, command: Callable[[str], list[str]]) -> str:
        """Start a process with a server in it; the URL of its API."""
        log = self._logs / f"{name}.log"
        log.unlink(missing_ok=True)
        # Opened here: a port that is only known to be free can be taken before the process is there.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            variables = {**self._environment, "TROUPE_LISTENER": str(listener.fileno())}
            context = running(
                command(address), log, folder=self._asked.repo, environment=variables, descriptors=[listener.fileno()]
            )
            self._parts.append(Part(name, self._stack.enter_context(context), log))
        return address

    def _check(self) -> None:
        for part in self._parts:
            if part.process.poll() is not None:
                raise ConfigError(f"AgentBench's {part.name} has ended; the end of {part.log}:\n{end_of(part.log)}")

    def _until(self, done: Callable[[], bool], complaint: str) -> None:
        end = time.monotonic() + _START_S
        while not done():
            self._check()
            if time.monotonic() > end:
                raise ConfigError(f"{complaint} after {_START_S:g} s. The logs are in {self._logs}.")
            time.sleep(0.2)

    def _workers(self) -> dict[str, Any] | None:
        """What the controller knows of each task; None if it does not answer."""
        with contextlib.suppress(OSError, ValueError):
            with urllib.request.urlopen(f"{self._address}/list_workers", timeout=10) as answer:
                found: dict[str, Any] = json.load(answer)
            return found
        return None
