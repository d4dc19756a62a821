"""Programs that a command has started, when the command is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

SERVER = """
import time
from deployments.cli.endpoint.processes import end_with_parent
end_with_parent()
print("started", flush=True)
time.sleep(600)
"""
COMMAND = f"""
import sys, time
from pathlib import Path
from deployments.cli.endpoint.processes import running
with running([sys.executable, "-c", {SERVER!r}], Path(sys.argv[1])) as process:
    print(process.pid, flush=True)
    time.sleep(600)
"""


def test_the_server_of_a_killed_command_ends(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with subprocess.Popen([sys.executable, "-c", COMMAND, str(log)], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        server = psutil.Process(int(command.stdout.readline()))
        while "started" not in log.read_text():
            time.sleep(0.01)
        command.kill()
    psutil.wait_procs([server], timeout=60)
    assert not server.is_running()
