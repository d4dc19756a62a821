"""A checkpoint that is overwritten while its model is served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from deployments.config.model import ModelEntry
from deployments.host.loaded_model import LoadedModel
from deployments.host.loading import Loading
from model_loaders.auto import load_model
from model_loaders.weights.mapped_weights import read_mapped_weights
from tests.tiny import byte_tokenizer, llama


def auto(folder: Path) -> tuple[str, dict[str, Any]]:
    return "model_loaders.auto:load_model", {"model_name": str(folder)}


def own(folder: Path) -> tuple[str, dict[str, Any]]:
    return f"{__name__}:own_loader", {"folder": str(folder)}


def own_loader(folder: str) -> dict[str, Any]:
    return {"model": LlamaForCausalLM.from_pretrained(folder), "tokenizer": byte_tokenizer()}


def by_state_dict(folder: str) -> dict[str, Any]:
    model = llama(seed=1)
    model.load_state_dict(load_file(f"{folder}/model.safetensors"), assign=True)
    return {"model": model, "tokenizer": byte_tokenizer()}


def assigned(folder: Path) -> tuple[str, dict[str, Any]]:
    return f"{__name__}:by_state_dict", {"folder": str(folder)}


def loaded(loader: str, kwargs: dict[str, Any]) -> LoadedModel:
    entry = {"id": "a", "loader": loader, "kwargs": kwargs, "engine": {"pack_linears": False, "threads": 1}}
    return asyncio.run(Loading("cpu").load(ModelEntry.model_validate(entry)))


class Scaled(torch.nn.Linear):
    """A linear whose weight has a state beside it, as quantized ones have."""

    def __init__(self, linear: torch.nn.Module, scale: torch.Tensor) -> None:
        super().__init__(1, 1)
        self.weight, self.bias = linear.weight, None
        self.weight.quant_state = SimpleNamespace(absmax=[scale])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states) * self.weight.quant_state.absmax[0].mean()


def with_state(folder: str) -> dict[str, Any]:
    weights = load_file(f"{folder}/model.safetensors")
    model = llama()
    model.lm_head = Scaled(model.lm_head, weights["model.norm.weight"])
    return {"model": model, "tokenizer": byte_tokenizer()}


def stateful(folder: Path) -> tuple[str, dict[str, Any]]:
    return f"{__name__}:with_state", {"folder": str(folder)}


def save(folder: Path, *, pickled: bool = False) -> Path:
    """A checkpoint; the path of its weights."""
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    if pickled:
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
        file = folder / "pytorch_model.bin"
    return file


def overwrite(file: Path) -> None:
    """In place, as a trainer does that keeps one file."""
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.write(b"\0" * size)


@pytest.mark.parametrize("loader", [auto, own, assigned, stateful])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_checkpoint_overwritten_in_place_changes_nothing(
    tmp_path: Path, loader: Callable[[Path], tuple[str, dict[str, Any]]], pickled: bool
) -> None:
    if pickled and loader in (assigned, stateful):
        pytest.skip("reads safetensors")
    file = save(tmp_path, pickled=pickled)
    model = loaded(*loader(tmp_path))
    try:
        overwrite(file)
        expected, found = llama().state_dict(), model.info.model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        state = getattr(model.info.model.lm_head.weight, "quant_state", None)
        assert state is None or state.absmax[0].mean() == 1
        # A plain tensor keeps the mapping it was a view of, unread.
        assert loader is stateful or str(file) not in Path("/proc/self/maps").read_text()
    finally:
        model.close()


def test_the_hubs_cache_stays_mapped(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    file = save(repository / "checkpoint")
    blob = repository / "blobs" / ("0123456789abcdef" * 4)
    blob.parent.mkdir()
    file.rename(blob)
    file.symlink_to(blob)
    model = LlamaForCausalLM.from_pretrained(file.parent)
    assert read_mapped_weights(model) == 0
    assert str(blob) in Path("/proc/self/maps").read_text()


def test_weights_that_do_not_fit_stay_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = save(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr("model_loaders.weights.mapped_weights.free_bytes", lambda: 1000)
    assert read_mapped_weights(model) == 0
    assert f"{file} stays mapped" in caplog.text


@pytest.mark.parametrize(("free", "mapped"), [(2**40, False), (1000, True)])
def test_a_folder_is_read_and_not_mapped_if_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, mapped: bool
) -> None:
    """A file that is cut short while it is mapped would end the process, in the middle of a load too."""
    file = save(tmp_path)
    monkeypatch.setattr("model_loaders.weights.changeable.free_bytes", lambda: free)
    info = load_model(str(tmp_path))
    assert (str(file) in Path("/proc/self/maps").read_text()) is mapped
    assert info.model.get_input_embeddings().weight.shape == (261, 48)
