"""Loading a model and letting it go; loaders that hang are in test_host.py, with what the leases make of them."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from deployments.config.model import ModelEntry
from deployments.core.errors import ModelLoadFailed, OutOfMemory
from deployments.host.loading import Loading
from tests.tiny import byte_tokenizer, llama

pytestmark = pytest.mark.usefixtures("all_is_walked")

LOADED: list[weakref.ref[Any]] = []


def load_model() -> dict[str, Any]:
    """A tiny Llama, remembered without being kept alive."""
    model = llama()
    LOADED.append(weakref.ref(model))
    return {"model": model, "tokenizer": byte_tokenizer()}


def too_large() -> dict[str, Any]:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    except torch.OutOfMemoryError as error:
        raise RuntimeError("The weights could not be read.") from error


def entry(loader: Callable[..., Any], **fields: Any) -> ModelEntry:
    settings = {"id": "a", "loader": f"{__name__}:{loader.__name__}", "engine": {"kind": "generate"}, **fields}
    return ModelEntry.model_validate(settings)


def test_a_model_that_was_let_go_leaves_memory() -> None:
    async def main() -> None:
        loading = Loading("cpu")
        model = await loading.load(entry(load_model))
        assert model.info.model_name == "a"
        letting_go = loading.unload("a", model)
        del model
        await letting_go
        gc.collect()
        assert [reference() for reference in LOADED] == [None]

    asyncio.run(main())


def test_a_loader_that_fails_for_want_of_memory_says_so() -> None:
    async def main() -> None:
        with pytest.raises(OutOfMemory, match="Model 'a' does not fit on cpu"):
            await Loading("cpu").load(entry(too_large))

    asyncio.run(main())


def leaves_traces() -> dict[str, Any]:
    """Research code often makes its model with another default dtype, and reads files beside it."""
    torch.set_default_dtype(torch.bfloat16)
    os.chdir(tempfile.gettempdir())
    return {"model": llama(), "tokenizer": byte_tokenizer()}


def leaves_the_folder_and_fails() -> dict[str, Any]:
    os.chdir(tempfile.gettempdir())
    raise ValueError("no weights")


def test_the_folder_is_put_back_after_a_loader_that_fails() -> None:
    folder = os.getcwd()
    try:
        with pytest.raises(ModelLoadFailed, match="no weights"):
            asyncio.run(Loading("cpu").load(entry(leaves_the_folder_and_fails)))
        assert os.getcwd() == folder
    finally:
        os.chdir(folder)


def test_what_a_loader_changes_for_other_models_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        loading = Loading("cpu")
        await loading.unload("a", await loading.load(entry(leaves_traces)))

    dtype, folder = torch.get_default_dtype(), os.getcwd()
    try:
        asyncio.run(main())
        assert os.getcwd() == folder
    finally:
        torch.set_default_dtype(dtype)
        os.chdir(folder)
    said = "The loader of model a has changed"
    assert f"{said} torch's default dtype to torch.bfloat16, which belongs to every model" in caplog.text
    assert f"{said} the working directory to {os.path.realpath(tempfile.gettempdir())}," in caplog.text


BEGUN: list[str] = []
SECONDS = itertools.cycle((0.2, 0.5))


class SlowToMake(LlamaForCausalLM):
    """The first of two that are made at once is ready first."""

    def __init__(self, config: Any) -> None:
        time.sleep(next(SECONDS))
        super().__init__(config)


def make_slowly(path: str) -> dict[str, Any]:
    BEGUN.append("loader")
    model = SlowToMake.from_pretrained(path, local_files_only=True, dtype=torch.float64)
    BEGUN.append("end")
    return {"model": model, "tokenizer": byte_tokenizer()}


@pytest.mark.parametrize("turn_s", [60, 0.05])
def test_two_models_that_load_at_once_are_made_one_after_the_other(tmp_path: Path, turn_s: float) -> None:
    """While it makes a model, transformers replaces functions of the process and changes torch's default dtype."""
    tied = llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    dtype = torch.get_default_dtype()
    BEGUN.clear()

    async def main() -> None:
        loading = Loading("cpu")
        entries = [entry(make_slowly, id=i, kwargs={"path": str(tmp_path)}, hook_timeout_s=turn_s) for i in "ab"]
        models = await asyncio.gather(*map(loading.load, entries))
        for model in models:
            found = model.info.model
            assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
        await asyncio.gather(*(loading.unload(entry.id, model) for entry, model in zip(entries, models, strict=True)))

    asyncio.run(main())
    assert torch.get_default_dtype() == dtype
    expected = ["loader", "end"] * 2 if turn_s == 60 else ["loader", "loader", "end", "end"]
    assert expected == BEGUN
