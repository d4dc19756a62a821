"""Servers for the pages' examples."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deployments.cli.endpoint.processes import free_port
from deployments.cli.main import app, main
from model_loaders.demo import load_model
from tests.docs.pages import ROOT
from tests.docs.session import Session
from tests.openai.conftest import Server, serve  # noqa: F401

STAND_INS = {
    "org/vision-model": "tests.openai.tiny_models:with_images",
    "org/tool-model": "tests.docs.stand_ins:with_tools",
    "org/reasoning-model": "tests.docs.stand_ins:with_reasoning",
}
"""Models that the pages name and that no test can download, and the loaders that take their place."""


def _standing_in(arguments: list[str]) -> list[str]:
    found = [name for name in arguments if name in STAND_INS]
    return [STAND_INS.get(each, each) for each in arguments] + [part for name in found for part in ("--id", name)]


@contextlib.contextmanager
def in_process(arguments: list[str], folder: Path) -> Iterator[tuple[str, None]]:
    """Serve the configuration that `troupe serve` would, in this process and without Ray."""
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, ["serve", *_standing_in(arguments), "--print-config"])
        assert done.exit_code == 0, f"troupe serve {arguments}: {done.output} {done.exception}"
        (application,) = yaml.safe_load(done.stdout)["applications"]
        args: dict[str, Any] = {"folder": str(folder), **application["args"]}
        server = Server(args.pop("api", {}), args.pop("models"), **args)
        server.start()
        try:
            yield server.url, None
        finally:
            server.stop()


def command_in_process(arguments: list[str], folder: Path) -> str:
    """Run `troupe` in this process, which has imported torch and the libraries of models already."""
    printed = io.StringIO()
    streams = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with contextlib.chdir(folder), streams[0], streams[1], pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code, f"troupe {arguments}: {printed.getvalue()}"
    return printed.getvalue()


@contextlib.contextmanager
def by_command(arguments: list[str], folder: Path) -> Iterator[tuple[str, str]]:
    """Run `troupe serve` itself; gives what it has printed once it serves."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TROUPE_PORT": str(port), "TROUPE_LOGS": str(folder)}
    command = [sys.executable, "-m", "deployments.cli.main", "serve", *_standing_in(arguments)]
    with (folder / "server.log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_for_the_banner(process, folder / "server.log")
            yield url, (folder / "server.log").read_text(encoding="utf-8")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _wait_for_the_banner(process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while "stop:" not in log.read_text(encoding="utf-8"):
        ended = process.poll() is not None or time.monotonic() > end
        assert not ended, log.read_text(encoding="utf-8")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the tutorial makes."""
    folder = tmp_path_factory.mktemp("made") / "my-checkpoint"
    demo = load_model()
    demo.model.save_pretrained(folder)
    demo.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Session]:
    """A reader in an empty folder; the loaders that are imported from it are forgotten afterwards.

    A parameter is how servers are run; without one they, and what else `troupe` does alone in a block, run in this
    process.
    """
    folder = tmp_path / "work"
    folder.mkdir()
    served = getattr(request, "param", in_process)
    session = Session(folder, served, command=command_in_process if served is in_process else None)
    try:
        yield session
    finally:
        session.close()
        sys.path[:] = [place for place in sys.path if place != str(folder)]
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(str(folder)):
                del sys.modules[name]
