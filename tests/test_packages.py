"""Who may import whom, and how large folders and files may be."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "deployments").rglob("*.py"), *(ROOT / "model_loaders").rglob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FOLDERS = sorted({path.parent for path in SOURCES})

Stage = tuple[list[str], list[str]]
"""Modules, and those that must not come with them, nor with the stages before them."""


def modules(folder: str) -> list[str]:
    """The modules in and below a folder, by their dotted names."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in SOURCES]
    return [".".join(path.parts) for path in paths if path.is_relative_to(folder) and path.name != "__init__"]


def imported(stages: list[Stage]) -> list[list[str]]:
    """Which of its suspects are in memory after each stage, all of them in one fresh interpreter."""
    code = ["import sys"]
    for names, suspects in stages:
        code += [f"import {', '.join(names)}", f"print(*[name for name in {suspects} if name in sys.modules])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def imports(path: Path) -> Iterator[str]:
    """The modules that a file names in import statements, wherever they stand."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(
    "stages",
    [
        [
            (["model_loaders.contract"], ["torch", "transformers", "ray", "pydantic"]),
            (modules("deployments/core"), ["torch", "transformers", "ray", "pydantic"]),
            (modules("deployments/registry"), ["torch", "transformers", "ray", "fastapi", "starlette"]),
            (modules("deployments/openai"), ["torch", "transformers", "ray"]),
            (["deployments.ingress", "deployments.app", "deployments.router"], ["torch", "transformers"]),
        ],
        [
            (modules("deployments/engine"), ["ray", "fastapi", "pydantic", "starlette"]),
            (["deployments.local"], ["ray"]),
        ],
    ],
    ids=["ingress", "replica"],
)
def test_what_comes_with_a_package(stages: list[Stage]) -> None:
    assert all(names for names, _ in stages)
    assert imported(stages) == [[] for _ in stages]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_statements(path: Path) -> None:
    place, named = path.relative_to(ROOT), set(imports(path))
    if place.parent not in (Path("deployments"), Path("deployments/cli")):
        assert not {name for name in named if name.split(".")[0] == "ray"}
    if place.is_relative_to("deployments/engine"):
        assert {name for name in named if name.startswith("model_loaders")} <= {"model_loaders.contract"}
    if place != Path("deployments/ray_internals.py"):
        assert not {name for name in named if name.startswith("ray.") and "._" in name}
        assert "ray._" not in path.read_text(encoding="utf-8")
    if place.is_relative_to("deployments/core"):
        assert not {name for name in named if name.split(".")[0] == "model_loaders"}
        assert not {name for name in named if name.startswith("deployments.") and ".core." not in name}
    if place.parent not in map(Path, ("deployments", "deployments/cli", "deployments/compat")):
        assert not {name for name in named if name.startswith("deployments.compat")}
    if not place.is_relative_to("model_loaders/backends"):
        assert not {name for name in named if name.startswith("model_loaders.backends")}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_can_be_read_at_a_glance(folder: Path) -> None:
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= 14
    assert {path.name: count for path in files if (count := len(path.read_text().splitlines())) > 400} == {}


def test_packages_have_an_order() -> None:
    """No import runs back up: a folder never needs one that needs it."""
    needs: dict[str, set[str]] = {}
    for path in SOURCES:
        own = str(path.parent.relative_to(ROOT))
        for name in imports(path):
            target = ROOT / name.replace(".", "/")
            folder = target if target.is_dir() else target.parent
            if name.split(".")[0] in ("deployments", "model_loaders"):
                needs.setdefault(own, set()).add(str(folder.relative_to(ROOT)))
    order = graphlib.TopologicalSorter({folder: need - {folder} for folder, need in needs.items()})
    assert next(iter(order.static_order())) in ("deployments/core", "deployments/engine/cache")


OF_OTHERS = {
    "_exit",
    "_add_pending_request_to_indices",
    "_get_pending_request_matching_internal_request_id",
    "_remove_pending_request_from_indices",
    "_request_id",
}
"""Names of Ray's that the router overrides, one of the openai client's answers, and one of os."""


def private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def private_names(path: Path) -> Iterator[str]:
    """The private names that a file gives to functions, classes, variables and attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id


def reaches(path: Path) -> Iterator[str]:
    """The private names that a file uses of other objects and modules, in strings of `setattr` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("deployments", "model_loaders"):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("setattr", "getattr", "delattr"):
                yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def test_tests_go_through_the_front_door() -> None:
    """No test uses a private name of ours."""
    ours = {name for path in SOURCES for name in private_names(path) if private(name)} - OF_OTHERS
    found = {(str(path.relative_to(ROOT)), name) for path in TESTS for name in reaches(path) if name in ours}
    assert found == set()
