"""Any Hugging Face model by name or folder, through the Auto classes.

- id: my-model
  loader: model_loaders.auto:load_model
  kwargs: {model_name: org/name-or-folder}
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from deployments.core.errors import ModelLoadFailed, last_line
from model_loaders.contract import ModelInfo
from model_loaders.local_folder import check_checkpoint, local_or_hub, nowhere
from model_loaders.sentence_format import read_sentence_format
from model_loaders.text_side import load_text_side, read_template
from model_loaders.weights.adapter_folder import find_adapter
from model_loaders.weights.checkpoint import CheckpointOptions, IncompleteCheckpoint, load_checkpoint
from model_loaders.weights.model_class import (
    embedding_class,
    has_pretraining_head,
    model_class,
    named_class,
    takes_part,
)

logger = logging.getLogger("troupe.loader")


def load_model(
    model_name: str,
    device: str = "cpu",
    *,
    auto_class: str | None = None,
    dtype: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    quantization_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    tokenizer_name: str | None = None,
    chat_template: str | None = None,
    plain_chat: bool = False,
    max_model_len: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    allow_missing_keys: Sequence[str] | str = (),
    allow_unexpected_keys: Sequence[str] | str = (),
    adapter: str | None = None,
) -> ModelInfo:
    """Load a model with its tokenizer or processor.

    Args:
        model_name: Hub id or local folder.
        device: where the model goes, unless `device_map` says otherwise.
        auto_class: name of a transformers class, or package.Class; None takes the class that the checkpoint was saved
            from, else the Auto class that knows its config.
        dtype: such as "bfloat16"; None takes the checkpoint's on a GPU, and on a CPU bfloat16 where the processor
            computes with it and the checkpoint is not wider, else float32.
        device_map: "auto" spreads the model over all GPUs of the replica (accelerate).
        attn_implementation: such as "sdpa", "eager" or "flash_attention_2".
        revision: branch, tag or commit of the Hub repository.
        quantization_config: the arguments of a transformers quantization config and its `quant_method`
            (`bitsandbytes`, `quanto`, `hqq`, `torchao` …; torchao's `quant_type` may be the name of its config class).
        trust_remote_code: run code that comes with the checkpoint.
        tokenizer_name: Hub id or folder of the tokenizer, if it is not the model's.
        chat_template: a Jinja template, or the path of a file that holds one.
        plain_chat: answer chats as `Role: text` lines if there is no template.
        max_model_len: positions, prompt and text together.
        model_kwargs: further arguments of `from_pretrained`; fields of the config, such as rope_scaling, replace those
            of the checkpoint.
        allow_missing_keys, allow_unexpected_keys, adapter: see `checkpoint.CheckpointOptions`.

    Raises:
        ModelLoadFailed: no such class, the checkpoint cannot be loaded, or its weights are not those of the class.
    """
    model_name = local_or_hub(model_name)
    further = model_kwargs or {}
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    options = CheckpointOptions(
        allow_missing_keys=allow_missing_keys, allow_unexpected_keys=allow_unexpected_keys, adapter=adapter
    )
    find_adapter(model_name, revision, adapter)
    sentence_format = read_sentence_format(model_name, revision)
    weights = model_name if sentence_format is None else sentence_format.weights_of(model_name)
    placement = {"device_map": device_map if device_map is not None else {"": device}}
    optional = {"attn_implementation": attn_implementation, "quantization_config": _quantization(quantization_config)}
    arguments = {**common, **placement, **{key: value for key, value in optional.items() if value is not None}}
    _check_further(further, {*arguments, "dtype", "config"})
    config, of_config = _config(weights, further, **common)
    model = _load_model(
        config,
        weights,
        auto_class,
        options,
        sentence_format is not None,
        of_config=of_config,
        dtype=_dtype(dtype, config, device),
        **arguments,
        **{key: value for key, value in further.items() if key not in of_config},
    )
    processor, tokenizer = load_text_side(tokenizer_name or weights, **common)
    return ModelInfo(
        model=model.eval(),
        model_name=model_name,
        processor=processor,
        tokenizer=tokenizer,
        chat_template=read_template(chat_template),
        plain_chat=plain_chat,
        max_model_len=max_model_len,
        sentence_format=sentence_format,
    )


def _check_further(given: dict[str, Any], taken: set[str]) -> None:
    """Refuse `model_kwargs` that the loader passes by itself.

    Raises:
        ModelLoadFailed: it names the first.
    """
    for name in given:
        if (own := name.removeprefix("torch_")) in taken:
            fix = "leave it out" if own == "config" else f"write {own} in the loader's kwargs, beside model_kwargs"
            raise ModelLoadFailed(f"model_kwargs has {name}: {given[name]!r}, which the loader sets itself; {fix}.")


def _config(name: str, given: dict[str, Any], **common: Any) -> tuple[Any, dict[str, Any]]:
    """The checkpoint's config, with those of the given fields that it has; and these fields."""
    try:
        config = AutoConfig.from_pretrained(name, **common)
        own = {key: value for key, value in given.items() if hasattr(config, key) and key != "quantization_config"}
        return (AutoConfig.from_pretrained(name, **common, **own) if own else config), own
    except (OSError, ValueError) as error:
        check_checkpoint(Path(name))
        if Path(name).exists() or not isinstance(error, OSError):
            raise
        raise nowhere(name, last_line(error)) from error


def _load_model(
    config: Any,
    name: str,
    given: Any,
    options: CheckpointOptions,
    embeds: bool,
    *,
    of_config: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """Load the model with the given class or class name, else with the checkpoint's class.

    A checkpoint without its head is loaded without it if it is for embeddings: its folder says so (`embeds`), its
    config names no class, or the head is that of an encoder's pretraining. The fields `of_config` are in the config;
    the class of a part reads its own config.
    """
    if given is not None:
        found = named_class(given) if isinstance(given, str) else given
        own = of_config if takes_part(config, found) else {"config": config}
        return load_checkpoint(found, name, options, **own, **kwargs)
    choose = embedding_class if embeds else model_class
    found = choose(config, trusted=bool(kwargs.get("trust_remote_code")))
    try:
        return load_checkpoint(found, name, options, config=config, **kwargs)
    except IncompleteCheckpoint as error:
        for_embeddings = embeds or not getattr(config, "architectures", None) or has_pretraining_head(config, found)
        if not (for_embeddings and error.lacks_head):
            raise
    logger.warning("%s has no head: it is loaded for embeddings alone.", name)
    return load_checkpoint(transformers.AutoModel, name, options, config=config, **kwargs)


def _dtype(asked: str | None, config: Any, device: str) -> torch.dtype:
    if asked is not None:
        found = getattr(torch, asked.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ModelLoadFailed(f"dtype {asked!r} is unknown; write float32, bfloat16 or float16.")
        return found
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    if not device.startswith("cpu"):
        return torch.bfloat16 if stored == torch.float32 else stored
    narrow = stored in (torch.bfloat16, torch.float16)
    return torch.bfloat16 if narrow and torch.cpu._is_avx512_bf16_supported() else torch.float32


def _quantization(config: dict[str, Any] | None) -> Any:
    if config is None:
        return None
    from transformers import HqqConfig, TorchAoConfig
    from transformers.quantizers import AutoQuantizationConfig

    method, rest = config.get("quant_method"), {k: v for k, v in config.items() if k != "quant_method"}
    # from_dict reads these two only in the form that checkpoints store.
    if method == "hqq" and "quant_config" not in rest:
        return HqqConfig(**rest)
    if method == "torchao" and isinstance(rest.get("quant_type"), str):
        quantization = importlib.import_module("torchao.quantization")
        return TorchAoConfig(**{**rest, "quant_type": getattr(quantization, rest["quant_type"])()})
    return AutoQuantizationConfig.from_dict(config)
