"""Programs that a command has started, when the command is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deployments.cli.endpoint import guard
from deployments.cli.endpoint.processes import processor_seconds, running, standing_still

PROGRAM = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
print(child.pid, flush=True)
child.wait()
"""
COMMAND = f"""
import sys, time
from pathlib import Path
from deployments.cli.endpoint.processes import running, standing_still
log = Path(sys.argv[1])
with running([sys.executable, "-c", {PROGRAM!r}], log) as process:
    while not (log.exists() and log.read_text().endswith("\\n")):
        time.sleep(0.01)
    with standing_still([process.pid] if sys.argv[2] == "held" else []):
        log.with_suffix(".ready").touch()
        time.sleep(600)
"""


@pytest.mark.parametrize("state", ["going", "held"])
def test_what_a_killed_command_has_started_ends(tmp_path: Path, state: str) -> None:
    log = tmp_path / "program.log"
    with subprocess.Popen([sys.executable, "-c", COMMAND, str(log), state]) as command:
        while not (log.with_suffix(".ready").exists() and log.exists() and log.read_text().endswith("\n")):
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


def test_what_stands_still_takes_no_processor_time_and_goes_on_after_it(tmp_path: Path) -> None:
    busy = "import os\nos.setpgid(0, 0)\nos.fork()\nwhile True: pass"
    with running([sys.executable, "-c", busy], tmp_path / "log") as process:
        while len(started := guard.started(process.pid)) < 2 or processor_seconds(process.pid) < 0.1:
            time.sleep(0.01)
        with standing_still([process.pid]):
            assert psutil.Process(process.pid).status() != psutil.STATUS_STOPPED, "it ends them if this process ends"
            while {psutil.Process(each).status() for each in started} != {psutil.STATUS_STOPPED}:
                time.sleep(0.01)
            taken = processor_seconds(process.pid)
            time.sleep(0.1)
            assert processor_seconds(process.pid) == taken
        while processor_seconds(process.pid) < taken + 0.1:
            time.sleep(0.01)
    while guard.started(process.pid):  # they were killed, though their process group is another one
        time.sleep(0.01)
