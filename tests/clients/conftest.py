"""Real clients, each in an environment of its own that sees the project's packages too."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import serving

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = ROOT / "model_loaders" / "demo" / "weights"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.clients)


def client_python(name: str, *requirements: str) -> Path:
    """The interpreter of a client's environment, made at the first call and kept beside the project's own."""
    folder = ROOT / ".venv" / "clients" / name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    wanted = "\n".join(requirements)
    if not (stamp.exists() and stamp.read_text() == wanted):
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        site = next((folder / "lib").glob("python*")) / "site-packages"
        (site / "project.pth").write_text(sysconfig.get_paths()["purelib"])
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # The pin keeps pip from replacing the project's CPU build of torch.
        subprocess.run([*install, *requirements, "torch~=2.13.0"], check=True, timeout=900)
        stamp.write_text(wanted)
    return python


def run_script(python: Path, script: str, arguments: dict[str, Any], timeout: float = 600) -> Any:
    """Run a script of this folder with JSON on its standard input; its last line of output is JSON."""
    done = subprocess.run(
        [str(python), str(Path(__file__).parent / script)],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def folder_model(cluster: str) -> Iterator[str]:
    """The demo weights as a local folder, through the Auto loader, in float32; the base URL without /v1."""
    entry = {
        "id": "folder",
        "loader": "model_loaders.auto:load_model",
        "kwargs": {"model_name": str(WEIGHTS), "dtype": "float32"},
        "engine": {"max_rows": 32},
    }
    with serving(cluster, {"models": [entry]}) as url:
        yield url
