"""`pip install .` gives a package that works away from the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
USE = """
import deployments, model_loaders.demo
assert "site" in deployments.__file__, deployments.__file__
from model_loaders.resolve import load_model_info
from deployments.config.app import parse_args
parse_args({"models": [{"id": "demo", "loader": "model_loaders.demo:load_model"}]})
print(load_model_info("model_loaders.demo:load_model", {}, "cpu").model.num_parameters())
"""


def test_the_installed_package_loads_the_demo_model(tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "copy"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "--target", str(site), str(copy)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{USE}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) > 1_000_000
