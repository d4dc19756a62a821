"""Who may import whom: the walls between the rooms of the code, checked in fresh interpreters."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import deployments.engine
import deployments.openai

OPENAI = [f"deployments.openai.{module.name}" for module in pkgutil.walk_packages(deployments.openai.__path__)]
ENGINE = [f"deployments.engine.{module.name}" for module in pkgutil.walk_packages(deployments.engine.__path__)]


def imported(modules: list[str], suspects: list[str]) -> list[str]:
    """Which of the suspects are in memory after importing the modules."""
    code = f"import sys, {', '.join(modules)}\nprint(*[name for name in {suspects} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (OPENAI, ["torch", "transformers", "ray"]),
        (ENGINE, ["ray", "fastapi", "pydantic", "starlette"]),
        (
            ["deployments.core.calls", "deployments.core.model_card", "deployments.core.errors"],
            ["torch", "transformers", "ray", "pydantic"],
        ),
        (["model_loaders.contract"], ["torch", "transformers", "ray", "pydantic"]),
        (["deployments.ingress", "deployments.app", "deployments.router"], ["torch", "transformers"]),
        (["deployments.local"], ["ray"]),
    ],
)
def test_nothing_reaches_through_the_walls(modules: list[str], forbidden: list[str]) -> None:
    assert imported(modules, forbidden) == []
