"""Files of a model that are written, copied or cut short at this moment."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deployments.registry.complete import incomplete
from deployments.registry.files import model_files


def fault(folder: Path, marker: str | None = None) -> str | None:
    return incomplete(model_files({"model_name": str(folder)}), marker)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = {f"layer{i}": torch.zeros(100) for i in range(2)}
    for i, (name, tensor) in enumerate(weights.items(), 1):
        save_file({name: tensor}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    index = {"weight_map": {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate(weights, 1)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def test_a_whole_folder(folder: Path) -> None:
    torch.save({"a": torch.zeros(3)}, folder / "pytorch_model.bin")
    (folder / "__init__.py").touch()
    (folder / "merges.txt").touch()
    assert fault(folder) is None


@pytest.mark.parametrize("size", [0, 5, 40, 300])
def test_a_shard_that_is_cut_short(folder: Path, size: int) -> None:
    cut(folder / "model-00002-of-00002.safetensors", size)
    found = fault(folder)
    assert found is not None
    assert "model-00002-of-00002.safetensors has" in found


def test_a_shard_that_is_not_there_yet(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").unlink()
    found = fault(folder)
    assert found is not None
    assert "model-00001-of-00002.safetensors is missing; model.safetensors.index.json lists it." in found


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_an_archive_that_is_cut_short(folder: Path, share: float) -> None:
    file = folder / "pytorch_model.bin"
    torch.save({"a": torch.zeros(300)}, file)
    cut(file, int(share * file.stat().st_size))
    assert str(file) in (fault(folder) or "")


@pytest.mark.parametrize("text", ["", '{"vocab": {"a": 1', '{"added": [' + '"token", ' * 200_000])
def test_settings_that_are_cut_short(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in (fault(folder) or "")


def test_the_index_of_a_format_that_was_left_out(folder: Path) -> None:
    index = {"weight_map": {"layer1": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert fault(folder) is None
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert "is missing" in (fault(folder) or "")


def test_other_files_may_have_any_content(folder: Path) -> None:
    (folder / "notes.json").write_text('{"step": 1}\n{"step": 2}\n')
    assert fault(folder) is None


def test_a_marker_that_is_written_last(folder: Path) -> None:
    assert "no DONE" in (fault(folder, "DONE") or "")
    (folder / "DONE").touch()
    assert fault(folder, "DONE") is None
    later = (folder / "DONE").stat().st_mtime + 5
    os.utime(folder / "config.json", (later, later))
    assert "DONE is older than" in (fault(folder, "DONE") or "")


def test_files_that_count(folder: Path) -> None:
    others = [
        "trainer_state.json",
        "optimizer.pt",
        "rng_state_0.pth",
        "eval_results.json",
        "scheduler.pt",
        "training_args.bin",
        "run.log",
    ]
    for name in (*others, "README.md", ".hidden.json", "model.safetensors.tmp", "1_Pooling/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "config.json").write_text("{}")
    assert [file.name for file in model_files({"model_name": str(folder), "dtype": "float32"})] == [
        "1_Pooling/config.json",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_arguments_of_other_names(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "corpus.json").write_text("{}")
    template = other / "chat.jinja"
    template.write_text("{{ messages }}")
    named = {"mine": str(folder), "data": str(other), "chat_template": str(template), "count": 3}
    names = [file.name for file in model_files(named)]
    assert names[0] == "chat_template/chat.jinja"
    assert all(name.startswith("mine/") for name in names[1:])
