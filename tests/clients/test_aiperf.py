"""aiperf against the running server: every request valid, usage and lengths as it counts them itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.clients.conftest import WEIGHTS, client_python


def test_a_streaming_chat_profile(folder_model: str, tmp_path: Path) -> None:
    python = client_python("aiperf", "aiperf==0.13.0")
    command = [
        str(python.parent / "aiperf"),
        *("profile", "--model", "folder", "--url", folder_model, "--endpoint-type", "chat", "--streaming"),
        *("--tokenizer", str(WEIGHTS), "--concurrency", "8", "--request-count", "24"),
        *("--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "16", "--output-tokens-stddev", "0"),
        *("--extra-inputs", "ignore_eos:true", "--artifact-dir", str(tmp_path), "--ui", "none"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (report,) = tmp_path.rglob("*aiperf.json")
    summary = json.loads(report.read_text())
    assert summary["request_count"]["avg"] == 24
    assert summary["output_sequence_length"]["avg"] == 16
    assert not summary.get("error_summary")
