"""What a fingerprint tells apart in models whose loader names no files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.config.model import ModelEntry
from deployments.host import fingerprint as fingerprints
from deployments.host.fingerprint import model_fingerprint
from deployments.registry.version import Version
from model_loaders.contract import ModelInfo
from tests.tiny import byte_tokenizer, llama


def named(info: ModelInfo | None = None, **fields: Any) -> tuple[str, str]:
    """The two parts of a fingerprint."""
    info = info or ModelInfo(model=llama(), tokenizer=byte_tokenizer())
    entry = ModelEntry.model_validate({"id": "a", "loader": "tests.openai.scripted:load_model", **fields})
    _, weights, setup = model_fingerprint(entry, Version(model="a"), info).name.split("-")
    return weights, setup


def test_equal_models_have_equal_fingerprints() -> None:
    assert named() == named()


def test_one_weight() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1
    changed = named(ModelInfo(model=model, tokenizer=byte_tokenizer()))
    assert changed[0] != named()[0]
    assert changed[1] == named()[1]


def test_the_chat_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += " "
    assert named(ModelInfo(model=llama(), tokenizer=tokenizer))[0] != named()[0]


@pytest.mark.parametrize(
    "fields",
    [{"engine": {"max_batch_size": 3}}, {"kwargs": {"a": 1}}, {"api": {"merge_consecutive_roles": True}}],
)
def test_how_it_is_served(fields: dict[str, Any]) -> None:
    assert named(**fields)[0] == named()[0]
    assert named(**fields)[1] != named()[1]


@pytest.mark.parametrize("package", ["transformers", "troupe-serve"])
def test_another_version_of_a_package(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    before, installed = named(), fingerprints.installed_version
    monkeypatch.setattr(fingerprints, "installed_version", lambda name: "99" if name == package else installed(name))
    assert named()[0] == before[0]
    assert named()[1] != before[1]


def test_a_model_without_a_module() -> None:
    def engine(*_: Any) -> Any:
        raise AssertionError

    assert named(ModelInfo(engine=engine, model_name="a"))[0] == named(ModelInfo(engine=engine, model_name="a"))[0]


def test_each_part_is_shown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    kwargs = {"model_name": str(tmp_path), "hf_token": "hf_secret", "max_tokens": 5, "dtype": "float32"}
    entry = ModelEntry.model_validate({"id": "a", "loader": "tests.openai.scripted:load_model", "kwargs": kwargs})
    info = ModelInfo(model=llama(), tokenizer=byte_tokenizer())
    found = model_fingerprint(entry, Version(model="a"), info)
    weights, setup = found.weights, found.setup
    assert found.name == f"troupe-w{weights['digest'][:12]}-s{setup['digest'][:12]}"
    assert weights["files"] == {
        "config.json": hashlib.sha256(b"{}").hexdigest(),
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
    }
    assert setup["loader"]["function"] == "load_model"
    assert setup["kwargs"] == {"hf_token": "(hidden)", "max_tokens": 5, "dtype": "float32"}
    assert setup["packages"].keys() == {"troupe-serve", "torch", "transformers", "tokenizers", "peft"}
    assert "hf_secret" not in str(found)


def test_files_that_were_rewritten_since_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    kwargs = {"model_name": str(tmp_path)}
    entry = ModelEntry.model_validate({"id": "a", "loader": "tests.openai.scripted:load_model", "kwargs": kwargs})
    info = ModelInfo(model=llama(), tokenizer=byte_tokenizer())
    found = model_fingerprint(entry, Version(model="a", digest="0" * 64), info)
    assert found.weights == {"digest": "0" * 64, "of": "files"}
    assert found.name.startswith("troupe-w000000000000-s")
