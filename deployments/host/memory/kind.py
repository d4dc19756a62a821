"""What decides which proofs hold for a model, beside the values of its weights."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Hashable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from deployments.config.model import ModelEntry
from deployments.registry.digest import loader_source
from deployments.registry.files import without_paths
from model_loaders.contract import ModelInfo

_OF_THE_FILES = ("_name_or_path", "name_or_path", "_commit_hash")


def model_kind(entry: ModelEntry, info: ModelInfo) -> Hashable | None:
    """Equal for models of one kind: of one class, config, dtype, device and set of engine options, loaded by the same
    code. Versions of libraries and the processor are those of the process.

    Returns:
        None for what is not a module: nothing is known of what it computes.
    """
    model = info.model
    if not isinstance(model, nn.Module):
        return None
    how = [
        loader_source(entry.loader),
        _without_name(without_paths(entry.kwargs), model),
        [asdict(entry.engine), entry.inside, entry.hook_timeout_s],
        [_config(getattr(model, name, None)) for name in ("config", "generation_config")],
        [torch.get_num_threads(), info.max_model_len, info.chat_template, [*info.stop_token_ids]],
        _text_side(info),
    ]
    return repr(how), tuple(_hooks(info)), tuple(_modules(model)), tuple(_tensors(model))


def _without_name(kwargs: dict[str, Any], model: Any) -> dict[str, Any]:
    """A loader's arguments without the model's name in the Hub."""
    name = getattr(model, "name_or_path", None)
    return {key: value for key, value in kwargs.items() if not name or value != name}


def _config(config: Any) -> Any:
    if config is None or not hasattr(config, "to_dict"):
        return None
    values = {key: value for key, value in config.to_dict().items() if key not in _OF_THE_FILES}
    return [values, getattr(config, "_attn_implementation", None)]


def _text_side(info: ModelInfo) -> list[Any]:
    tokenizer: Any = info.tokenizer
    size: int | None = None
    with contextlib.suppress(TypeError):  # a tokenizer of any kind
        size = len(tokenizer)
    names = [type(part).__qualname__ for part in (tokenizer, info.processor)]
    return [*names, size, getattr(tokenizer, "chat_template", None), getattr(info.processor, "chat_template", None)]


def _hooks(info: ModelInfo) -> list[Any]:
    """What the loader's hooks run: a function that is made at every load has the same code each time."""
    given = [getattr(info, field.name) for field in fields(info)]
    return [getattr(hook, "__code__", type(hook)) for hook in given if callable(hook)]


def _modules(model: nn.Module) -> list[Hashable]:
    return [
        (name, type(module), "forward" in vars(module), len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def _tensors(model: nn.Module) -> list[Hashable]:
    every = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return [(name, type(value), value.shape, value.dtype, str(value.device), value.layout) for name, value in every]
