"""Claude Code in print mode against a model that answers from a script, with the commands of its page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import ROOT, finished
from tests.openai import scripted
from tests.openai.conftest import SCRIPTED, Serve, serve  # noqa: F401

PAGE = ROOT / "docs" / "clients" / "messages.md"
FOLDER = ROOT / ".venv" / "clients" / "claude-code"
LS = '<tool_call>{"name": "Bash", "arguments": {"command": "ls", "description": "List the files"}}</tool_call>'


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of `claude`, installed once."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    if not (FOLDER / "node_modules" / ".bin" / "claude").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        install = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(FOLDER), "@anthropic-ai/claude-code"]
        subprocess.run(install, check=True, timeout=600, capture_output=True)
    return FOLDER / "node_modules" / ".bin"


def test_it_answers_and_calls_a_tool(serve: Serve, programs: Path, tmp_path: Path) -> None:  # noqa: F811
    model = {"id": "my-checkpoint", "loader": SCRIPTED, "engine": {"max_model_len": 1_000_000}}
    server = serve([model])
    (tmp_path / "seen.txt").write_text("")
    block = re.search(r"^```bash\nnpm install.*?\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    text = block[1].replace("http://127.0.0.1:8000", server.url)
    text = text.replace('"Which files are here?"', f"'{LS}' --output-format json --allowedTools Bash")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ANTHROPIC", "CLAUDE"))}
    environment |= {"HOME": str(tmp_path), "PATH": f"{programs}{os.pathsep}{environment['PATH']}"}
    output = finished(["bash", "-euo", "pipefail", "-c", text], 120, cwd=tmp_path, env=environment)
    assert '"is_error":false' in output
    (engine,) = [each for each in scripted.ENGINES if each.seen and "seen.txt" in (each.seen[-1].prompt_text or "")]
    assert "<tool>" in (engine.seen[-1].prompt_text or "")
