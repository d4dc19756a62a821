"""Loading a model and letting it go; loaders that hang are in test_host.py, with what the leases make of them."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deployments.config.model import ModelEntry
from deployments.core.errors import OutOfMemory
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
