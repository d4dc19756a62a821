"""Programs that a command has started, when the command is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deployments.cli.endpoint.processes import running

PROGRAM = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""
COMMAND = f"""
import sys, time
from pathlib import Path
from deployments.cli.endpoint.processes import running
with running([sys.executable, "-c", {PROGRAM!r}], Path(sys.argv[1])):
    time.sleep(600)
"""


def test_what_a_killed_command_has_started_ends(tmp_path: Path) -> None:
    log = tmp_path / "program.log"
    with subprocess.Popen([sys.executable, "-c", COMMAND, str(log)]) as command:
        while not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.01)
        child = psutil.Process(int(log.read_text()))
        started = [child, *child.parents()]
        started = started[: started.index(psutil.Process(command.pid))]
        assert len(started) == 3, "what runs the program, the program, and what that has started"
        command.kill()
    assert psutil.wait_procs(started, timeout=60)[1] == []


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_the_exit_status_is_that_of_the_program(tmp_path: Path, end: str, status: int) -> None:
    with running([sys.executable, "-c", f"import os, sys; {end}"], tmp_path / "log") as process:
        assert process.wait(60) == status
