"""Merged copies of adapters, in an environment that has PEFT."""

from __future__ import annotations

from pathlib import Path

from tests.clients.conftest import ROOT, client_python, run_shell


def test_merged_copies(tmp_path: Path) -> None:
    python = client_python("peft", ["peft==0.21.2"])
    tests = ROOT / "tests" / "openai" / "test_merged_adapters.py"
    printed = run_shell(python, f"cd {ROOT} && python -m pytest -n 0 -p no:cacheprovider {tests}", tmp_path)
    assert "passed" in printed
    assert "skipped" not in printed
