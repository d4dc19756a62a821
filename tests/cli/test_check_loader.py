"""scripts/check_loader shows what a loader's hooks do, or what is wrong with them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deployments.cli.check_loader import check
from deployments.core.errors import ModelLoadFailed
from tests.whisper import save_whisper

LOADER = """
from tests.tiny import byte_tokenizer, llama

def load_model():
    return {"model": llama(), "tokenizer": byte_tokenizer()}

def no_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return {"model": llama(), "tokenizer": tokenizer}

def encoder():
    return {"model": llama().model, "tokenizer": byte_tokenizer()}

def broken():
    raise ValueError("torn")
"""


@pytest.fixture
def loader(tmp_path: Path) -> str:
    file = tmp_path / "checked.py"
    file.write_text(LOADER)
    return str(file)


def run(name: str) -> None:
    asyncio.run(check(name, {}, message="Hi", max_tokens=4, device="cpu"))


def test_every_step_is_shown(loader: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"{loader}:load_model")
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said
    assert r"template  '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'" in said
    assert "4 tokens" in said


def test_a_model_without_a_head_is_shown_to_embed(loader: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"{loader}:encoder")
    said = capsys.readouterr().out
    assert "LlamaModel" in said
    assert "embed     48 dimensions" in said


def test_a_model_without_a_template_is_shown_as_one(loader: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"{loader}:no_template")
    said = capsys.readouterr().out
    assert "none: Model 'model' has no chat template. Give its loader" in said
    assert "decode    'Hi'" in said


def test_what_is_wrong_is_told(loader: str) -> None:
    with pytest.raises(ModelLoadFailed, match="ValueError: torn"):
        run(f"{loader}:broken")


def test_a_whisper_writes_down_a_tone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_whisper(tmp_path / "w", seed=5)
    work = check("model_loaders.auto:load_model", {"model_name": str(folder)}, message="", max_tokens=4, device="cpu")
    asyncio.run(work)
    said = capsys.readouterr().out
    assert "speech    windows of 30 s; de, en, ms, zh" in said
    assert "hear      2 s of a tone, taken for" in said
    assert "4 tokens in" in said
