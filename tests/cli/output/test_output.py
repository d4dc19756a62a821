"""Where a run's logs go, and what is left on the terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.cli.output.log_folder import new_log_folder, with_logs
from deployments.logs import LOG_FOLDER


@pytest.mark.parametrize(
    ("variables", "base"),
    [
        ({"TROUPE_LOGS": "{tmp}/logs"}, "logs"),
        ({"XDG_STATE_HOME": "{tmp}/state"}, "state/troupe/logs"),
        ({"HOME": "{tmp}/home"}, "home/.local/state/troupe/logs"),
    ],
)
def test_the_folder_and_the_oldest_are_removed(
    variables: dict[str, str], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TROUPE_LOGS", "XDG_STATE_HOME", LOG_FOLDER):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    old = [tmp_path / base / f"202001{day:02}-000000-99999999" for day in range(1, 26)]
    running = tmp_path / base / f"20191231-000000-{os.getpid()}"
    others = tmp_path / base / "mine"
    for folder in (*old, running, others):
        folder.mkdir(parents=True)
    folder = new_log_folder()
    assert folder.parent == tmp_path / base
    assert os.environ[LOG_FOLDER] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(folder.parent.iterdir()) == sorted([*old[-19:], folder, running, others])


def test_a_folder_that_cannot_be_made_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TROUPE_LOGS", str(tmp_path / "file" / "logs"))
    monkeypatch.setenv(LOG_FOLDER, "")
    folder = new_log_folder()
    assert folder.is_dir()
    folder.rmdir()


def test_what_a_configuration_says_of_logging_stays(tmp_path: Path) -> None:
    config = {"logging_config": {"encoding": "JSON"}, "applications": [{}, {"logging_config": {"logs_dir": "mine"}}]}
    written, every = with_logs(config, tmp_path)
    ours = {"logs_dir": str(tmp_path / "serve"), "enable_access_log": False}
    assert every == written["logging_config"] == {**ours, "encoding": "JSON"}
    assert written["applications"] == [{}, {"logging_config": {**ours, "logs_dir": "mine"}}]


LOGGED = ["from C++", "from Python", "from Ray", "from a loader"]
STAGES = """
import os, sys
from pathlib import Path
from deployments.cli.output.terminal import Terminal
terminal = Terminal()
terminal.redirect(Path(sys.argv[1]))
print("from Python", flush=True)
os.write(2, b"from C++\\n")
with terminal.stage("model") as stage:
    print("from Ray")
    print("from a loader", file=sys.stderr)
    stage.show(0.5)
    stage.result = "m is loaded"
terminal.complain("what is wrong")
"""


def test_only_our_lines_are_on_the_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STAGES, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "model        m is loaded (0.0 s)\n"
    assert done.stderr == "troupe: what is wrong\n"
    assert sorted((tmp_path / "log").read_text().splitlines()) == LOGGED


def on_a_terminal(log: Path, term: str) -> str:
    """What a terminal of this kind shows of the stages."""
    reader, writer = pty.openpty()
    command = [sys.executable, "-c", STAGES, str(log)]
    subprocess.run(command, stdout=writer, stderr=writer, check=True, env={**os.environ, "TERM": term})
    os.close(writer)
    shown = b""
    with contextlib.suppress(OSError):  # the end, as nobody writes any more
        while part := os.read(reader, 100_000):
            shown += part
    os.close(reader)
    assert sorted(log.read_text().splitlines()) == LOGGED
    return shown.decode()


def test_a_terminal_shows_a_bar_that_is_gone_in_the_end(tmp_path: Path) -> None:
    shown = on_a_terminal(tmp_path / "log", "xterm")
    assert "from" not in shown
    assert shown.index("━") < shown.rindex("\x1b[2K") < shown.index("m is loaded")


def test_a_terminal_that_cannot_move_its_cursor_shows_the_lines_alone(tmp_path: Path) -> None:
    shown = on_a_terminal(tmp_path / "log", "dumb")
    assert shown.splitlines() == ["model        m is loaded (0.0 s)", "troupe: what is wrong"]
