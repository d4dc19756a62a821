"""aiperf against the running server: every request valid, usage and lengths as it counts them itself."""

from __future__ import annotations

import json
from pathlib import Path

from tests.clients.conftest import WEIGHTS, client_python, run_shell
from tests.clients.page import block


def test_a_streaming_chat_profile(folder_model: str, tmp_path: Path) -> None:
    # The model's tokens are bytes: what is not text or is skipped would be counted differently from the text alone.
    letters = '\'{"min_tokens": 16, "guided_regex": "[a-z]{16}"}\''
    changes = {
        "http://127.0.0.1:8000": folder_model,
        "path/to/my-checkpoint": str(WEIGHTS),
        "my-checkpoint": "folder",
        "min_tokens:16": letters,
    }
    output = run_shell(
        client_python("aiperf"), block("aiperf", "bash", 0, changes), tmp_path, without=("HF_HUB_OFFLINE",)
    )
    (report,) = tmp_path.rglob("*aiperf.json")
    summary = json.loads(report.read_text())
    assert summary["request_count"]["avg"] == 24
    assert summary["output_sequence_length"]["min"] == summary["output_sequence_length"]["max"] == 16
    assert summary["osl_mismatch_count"]["avg"] == 0
    assert summary["usage_discrepancy_count"]["avg"] == 0
    assert summary["usage_completion_tokens"]["avg"] == 16
    assert not summary["error_summary"]
    assert "Discrepancy" not in output
    assert "Mismatch" not in output
