"""`pip install .` gives a package that works away from the repository."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import requests
import setuptools
import yaml

from deployments.cli.endpoint.processes import free_port
from tests.forms import forms
from tests.tiny import byte_tokenizer, llama

ROOT = Path(__file__).parent.parent
USE = """
import deployments, model_loaders.demo
assert "site" in deployments.__file__, deployments.__file__
from model_loaders.resolve import load_model_info
from deployments.config.app import parse_args
parse_args({"models": [{"id": "demo", "loader": "model_loaders.demo:load_model"}]})
print(load_model_info("model_loaders.demo:load_model", {}, "cpu").model.num_parameters())
"""
FROM_TROAPIS = """
from troapis.app import ModelInfo, run_app
import troapis.app, deployments, deployments.local, model_loaders.contract
assert "package" in deployments.__file__, deployments.__file__
assert troapis.app.run_app is troapis.run_app is run_app is deployments.local.run_app
assert ModelInfo is model_loaders.contract.ModelInfo
print(run_app.__name__)
"""
PACKAGES = str(Path(setuptools.__file__).parents[1])
PIP = ["install", "--quiet", "--no-deps", "--no-build-isolation"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files, away from it."""
    copy = tmp_path_factory.mktemp("package") / "copy"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def site(copy: Path) -> Path:
    """Where the wheel is installed."""
    site = copy.parent / "site"
    subprocess.run([sys.executable, "-m", "pip", *PIP, "--target", str(site), str(copy)], check=True)
    return site


def said(code: str, folder: Path, python: str = sys.executable, **environment: str) -> str:
    """What a program prints that runs away from the repository."""
    others = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code], cwd=folder, env={**others, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def used(site: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What programs print that use the package."""
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{USE}{FROM_TROAPIS}"
    return said(code, tmp_path_factory.mktemp("used")).splitlines()


def test_the_installed_package_loads_the_demo_model(used: list[str]) -> None:
    assert int(used[0]) > 1_000_000


def test_the_page_is_in_the_package(site: Path) -> None:
    folder = Path("deployments/openai/page/static")
    installed = {str(path.relative_to(site)) for path in (site / folder).rglob("*") if path.is_file()}
    assert installed == {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()} != set()


def test_its_command_knows_the_version(site: Path, tmp_path: Path) -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    shown = subprocess.run(
        [sys.executable, site / "bin" / "troupe", "--version"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout == f"troupe {wanted}\n"
    assert (
        said("from deployments.core.installed import server_version as v; print(v())", tmp_path, PYTHONPATH=str(site))
        == wanted
    )


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder beside one of models."""
    llama(max_position_embeddings=128).save_pretrained(tmp_path / "models" / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "models" / "tiny")
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def test_its_command_reads_a_folder(site: Path, elsewhere: Path) -> None:
    """Away from the repository, without a configuration; paths are relative to where it is typed."""
    command = [sys.executable, site / "bin" / "troupe", "serve", "../models/tiny", "--print-config"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
    (entry,) = yaml.safe_load(done.stdout)["applications"][0]["args"]["models"]
    assert entry["id"] == "tiny"
    assert Path(entry["kwargs"]["model_name"]).resolve() == elsewhere.parent / "models" / "tiny"


@pytest.mark.long
def test_its_command_serves_a_folder(site: Path, elsewhere: Path) -> None:
    others = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {**others, "PYTHONPATH": str(site), "TROUPE_LOGS": str(elsewhere / "logs")}
    port = free_port()
    command = [sys.executable, site / "bin" / "troupe", "serve", "../models/tiny", "--port", str(port)]
    with subprocess.Popen(
        command,
        cwd=elsewhere,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            said = list(itertools.takewhile(lambda line: "stop:" not in line, iter(server.stdout.readline, "")))
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "ignore_eos": True}
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            answer = requests.post(url, json=body, timeout=60).json()
        finally:
            server.terminate()
            said += server.stdout.readlines()
    assert (answer["model"], answer["usage"]["completion_tokens"]) == ("tiny", 3), said
    assert len(said) == 8, said  # four stages, three lines of the banner before its last, and one at the end


def test_programs_for_troapis_find_run_app(site: Path, used: list[str]) -> None:
    assert not (site / "compat").exists()
    assert used[1] == "run_app"


WHERE = "from importlib.util import find_spec; print(find_spec('troapis').origin)"


@forms("code", WHERE, FROM_TROAPIS)
def test_and_from_an_editable_install(copy: Path, tmp_path: Path, code: str) -> None:
    environment = tmp_path / "env"
    venv.create(environment)
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, *PIP]
    subprocess.run([*pip, "--editable", str(copy)], env={**os.environ, "PYTHONPATH": PACKAGES}, check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{PACKAGES}\n")  # what Troupe needs, after its own
    found = said(code, tmp_path, python)
    assert found == "run_app" or Path(found).is_relative_to(copy)
    (site / "theirs.pth").write_text(f"{a_troapis(tmp_path / 'theirs')}\n")
    assert said(ASK, tmp_path, python) == "theirs"


ASK = "from troapis.app import run_app; import troapis.routes; print(run_app())"


def a_troapis(folder: Path) -> Path:
    """A package of that name, as somebody else's installation puts it there."""
    package = folder / "troapis"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "routes.py").touch()
    (package / "app.py").write_text("from troapis import routes\ndef run_app(): return 'theirs'\n")
    return folder


def test_a_troapis_that_is_installed_wins(site: Path, tmp_path: Path) -> None:
    """In the same folder, before it on the path (a program's own folder) and after it (an editable installation)."""
    theirs = a_troapis(tmp_path / "theirs")
    for path in ((theirs, site), (site, theirs)):
        assert said(ASK, tmp_path, PYTHONPATH=":".join(map(str, path))) == "theirs"
    both = tmp_path / "both"
    shutil.copytree(site, both)
    a_troapis(both)
    assert said(ASK, tmp_path, PYTHONPATH=str(both)) == "theirs"


def test_every_package_that_is_imported_is_declared() -> None:
    """Or its interface is a part of one that is: FastAPI's of Starlette, pydantic's of pydantic_core,
    transformers' of the others. An error asks for openai if it is needed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [names for extra, names in project["optional-dependencies"].items() if extra != "dev"]
    wanted = {name for names in [project["dependencies"], *extras] for name in names}
    declared = {re.split(r"[^\w-]", name)[0].lower() for name in wanted}
    known = packages_distributions()
    imported = {name for folder in ("deployments", "model_loaders") for name in imports(ROOT / folder)}
    undeclared = {
        name
        for name in imported - sys.stdlib_module_names - {"deployments", "model_loaders", "troapis"}
        if declared.isdisjoint(each.lower().replace("_", "-") for each in known.get(name, [name]))
    }
    assert undeclared <= {
        *("starlette", "pydantic_core", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "openai")
    }


def imports(folder: Path) -> Iterator[str]:
    """The packages that the files of a folder import."""
    for node in (node for file in folder.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
