"""The README's commands and code do what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM

from model_loaders.resolve import load_model_info
from tests.tiny import byte_tokenizer, llama

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_scripts_it_names_exist() -> None:
    for name in re.findall(r"scripts/\w+", README):
        assert (ROOT / name).exists(), name


def test_the_curl_line(demo: str) -> None:
    (line,) = [block for block in blocks("bash") if block.startswith("curl")]
    done = subprocess.run(
        ["bash", "-c", line.replace("http://127.0.0.1:8000", demo)], capture_output=True, text=True, check=True
    )
    assert '"content":"k7Qp2x"' in done.stdout


def test_the_openai_snippet(demo: str) -> None:
    (code,) = [block for block in blocks("python") if "OpenAI(" in block]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8000", demo)], capture_output=True, text=True, check=True
    )
    assert "72" in done.stdout


def test_the_loader(tmp_path: Path) -> None:
    (code,) = [block for block in blocks("python") if "def load_model" in block]
    assert len(code.split("def ")[1].splitlines()) <= 10
    (tmp_path / "my_loader.py").write_text(code)
    llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    info = load_model_info(f"{tmp_path}/my_loader.py:load_model", {"path": str(tmp_path / "model")}, "cpu")
    assert isinstance(info.model, type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")))


def test_the_agentbench_configuration_names_our_route(demo: str) -> None:
    (block,) = [block for block in blocks("yaml") if "HTTPAgent" in block]
    agent = yaml.safe_load(block)["my-checkpoint"]["parameters"]
    assert agent["url"].endswith("/v1/chat/completions")
    assert "{response[choices][0][message][content]}" in agent["return_format"]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_figure_shows_what_was_measured() -> None:
    """The bars are the ratios of the table in docs/performance.md."""
    data = json.loads((ROOT / "docs/images/throughput.json").read_text())
    table = (ROOT / "docs/performance.md").read_text().split("## Measured")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+ x \d+) \| .+ \| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    assert [(row["prompts"], row["loop"], row["batching"]) for row in data["rows"]] == [
        (prompts, float(loop), float(batching)) for prompts, loop, batching in rows
    ]
    before = (ROOT / "docs/images/throughput.svg").read_text()
    subprocess.run([sys.executable, "scripts/plot_throughput.py"], cwd=ROOT, check=True)
    assert (ROOT / "docs/images/throughput.svg").read_text() == before, (
        "python scripts/plot_throughput.py draws it anew"
    )
