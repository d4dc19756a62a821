"""Real clients, each in an environment of its own that sees the project's packages too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import page
from tests.openai.templates import TEMPLATES
from tests.serving import serving

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = ROOT / "model_loaders" / "demo" / "weights"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.clients)


def client_python(name: str, requirements: list[str] | None = None, program: str | None = None) -> Path:
    """The interpreter of a client's environment, made at the first call and kept beside the project's own.

    Args:
        name: of the client.
        requirements: what to install; None for what docs/clients.md says.
        program: another Python than the project's, whose packages the environment then does not see.
    """
    folder = ROOT / ".venv" / "clients" / name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    requirements = page.requirements(name) if requirements is None else requirements
    if program is None:
        # The pin keeps pip from replacing the project's CPU build of torch.
        requirements = [*requirements, "torch~=2.13.0"]
    wanted = "\n".join([program or sys.version, *requirements])
    if not (stamp.exists() and stamp.read_text() == wanted):
        subprocess.run([program or sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        if program is None:
            site = next((folder / "lib").glob("python*")) / "site-packages"
            (site / "project.pth").write_text(sysconfig.get_paths()["purelib"])
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*install, *requirements], capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        stamp.write_text(wanted)
    return python


def run_script(python: Path, script: str, arguments: dict[str, Any], timeout: float = 600) -> Any:
    """Run a script of this folder with JSON on its standard input; its last line of output is JSON."""
    output = finished([str(python), str(Path(__file__).parent / script)], timeout, input=json.dumps(arguments))
    return json.loads(output.strip().splitlines()[-1])


def run_shell(python: Path, text: str, folder: Path, without: tuple[str, ...] = (), timeout: float = 600) -> str:
    """Run shell lines in `folder` with the programs of a client's environment first; their standard output.

    Args:
        without: environment variables that the client is not to see.
    """
    environment = {key: value for key, value in os.environ.items() if key not in without}
    environment["OMP_NUM_THREADS"] = "1"  # the server is on the same cores
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    return finished(["bash", "-euo", "pipefail", "-c", text], timeout, cwd=folder, env=environment)


def finished(command: list[str], timeout: float, **options: Any) -> str:
    """The standard output of a program that ends well; its whole process group is killed at the time limit."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **{key: value for key, value in options.items() if key != "input"},
    )
    try:
        output, errors = process.communicate(options.get("input"), timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, output[-6000:] + errors[-6000:]
    return str(output)


@pytest.fixture(scope="session")
def folder_model(cluster: str) -> Iterator[str]:
    """The demo weights as a local folder, through the Auto loader, in float32; the base URL without /v1.

    Model `agent` is the same with a chat template that has a place for tools.
    """
    loader = "model_loaders.auto:load_model"
    kwargs = {"model_name": str(WEIGHTS), "dtype": "float32"}
    models = [
        {"id": "folder", "loader": loader, "kwargs": kwargs, "engine": {"max_batch_size": 32}},
        {"id": "agent", "loader": loader, "kwargs": {**kwargs, "chat_template": TEMPLATES["hermes"]}},
    ]
    with serving(cluster, {"models": models, "max_models_per_replica": 2}) as url:
        yield url
