"""Adapters in an environment that has PEFT."""

from __future__ import annotations

from pathlib import Path

from tests.clients.conftest import ROOT, client_python, run_shell


def test_what_needs_peft(tmp_path: Path) -> None:
    python = client_python("peft", ["peft==0.21.2"])
    tests = " ".join(f"tests/openai/{name}.py" for name in ("test_merged_adapters", "test_against_peft"))
    printed = run_shell(python, f"cd {ROOT} && python -m pytest -n 0 -p no:cacheprovider {tests}", tmp_path)
    assert "passed" in printed
    assert "skipped" not in printed
