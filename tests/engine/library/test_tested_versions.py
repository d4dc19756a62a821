"""The newest version of transformers that is tested: one constant, what CI installs, and a warning beyond it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from deployments.engine.library import tested_versions
from deployments.local import make_app

ROOT = Path(__file__).parents[3]
INSTALLED = Version(importlib.metadata.version("transformers"))
TESTED = Version(tested_versions.TRANSFORMERS)
DEMO = {"models": [{"id": "demo", "loader": "model_loaders.demo:load_model"}]}


def needed() -> Requirement:
    """What pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(found for each in project["dependencies"] if (found := Requirement(each)).name == "transformers")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "transformers" in r.getMessage()]


def test_the_constant_is_what_ci_tests() -> None:
    """`scripts/test --newest` sets TROUPE_NEWEST."""
    assert TESTED in needed().specifier
    if INSTALLED > TESTED:
        pytest.skip(f"transformers {INSTALLED} has come since: if all else passes, raise tested_versions.TRANSFORMERS")
    if "TROUPE_NEWEST" in os.environ:
        assert INSTALLED == TESTED


def test_every_release_of_the_range_is_taken() -> None:
    assert str(needed().specifier) == "<6,>=5.17"
    assert all(each in needed().specifier for each in ("5.17.0", "5.23.0", "5.24.0", "5.99.1"))


def test_ci_runs_them() -> None:
    assert re.search(r"^scripts/test --newest$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    named = re.findall(r"tests/[\w/]+\.py", (ROOT / "scripts" / "test").read_text())
    assert "tests/engine/test_parity.py" in named
    assert all((ROOT / name).is_file() for name in named)


MAJOR, MINOR, PATCH = TESTED.release
NEWER = [f"{MAJOR}.{MINOR}.{PATCH + 1}", f"{MAJOR}.{MINOR + 1}.0", f"{MAJOR}.100.0", f"{MAJOR + 1}.0.0rc1"]


@pytest.mark.parametrize("newer", [*NEWER, f"{MAJOR}.{MINOR + 1}.0.dev0"])
def test_a_newer_version_is_one_warning_at_start(
    newer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(tested_versions, "version", lambda name: newer if name == "transformers" else real(name))
    make_app(DEMO)
    [said] = warnings(caplog)
    assert newer in said
    assert tested_versions.TRANSFORMERS in said


@pytest.mark.parametrize("known", ["5.17.0", "5.23.0", "5.9.3", tested_versions.TRANSFORMERS])
def test_a_tested_or_older_version_is_none(
    known: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tested_versions, "version", lambda name: known)
    make_app(DEMO)
    assert warnings(caplog) == []


PRIVATE = re.compile(
    r"past_key_values|cache_params|cache_position|transformers\.cache_utils|sdpa_attention_forward\b.*import"
    r"|model\._[a-z]|from transformers\S* import _"
)
ALLOWED = {"transformers_internals.py"}
OUR_OWN = re.compile(r"model\._(troupe|hf|modules|parameters|enable_peft)\w*")


def test_one_module_knows_what_differs() -> None:
    """Names that versions do not share, and private ones, are in `engine/library/transformers_internals.py` alone."""
    found: list[Any] = []
    for folder in ("deployments", "model_loaders", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            if (
                path.is_file()
                and path.name not in ALLOWED
                and path.suffix in ("", ".py")
                and "weights" not in path.parts
            ):
                lines = path.read_text().splitlines()
                found += [
                    (str(path.relative_to(ROOT)), i, line.strip())
                    for i, line in enumerate(lines, 1)
                    if PRIVATE.search(OUR_OWN.sub("", line))
                ]
    assert found == []
