"""A checkpoint whose weights are a pickle: tensors are read, code in it is not run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from model_loaders.auto import load_model
from tests.tiny import byte_tokenizer, llama


class Canary:
    """What a pickle can do to whoever reads it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.file),)


@pytest.mark.parametrize("harmful", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, harmful: bool) -> None:
    folder, canary = tmp_path / "checkpoint", tmp_path / "canary"
    model = llama()
    model.config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors: dict[str, Any] = dict(model.state_dict())
    torch.save({**tensors, "evil": Canary(canary)} if harmful else tensors, folder / "pytorch_model.bin")
    if harmful:
        with pytest.raises(Exception, match=r"(?i)weights_only|unsupported|unpickl"):
            load_model(str(folder))
    else:
        loaded = load_model(str(folder)).model
        assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not canary.exists()
