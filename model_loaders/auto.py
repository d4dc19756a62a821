"""Any Hugging Face model by name or folder, through the Auto classes.

- id: my-model
  loader: model_loaders.auto:load_model
  kwargs: {model_name: org/name-or-folder}
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from deployments.errors import ModelLoadFailed, last_line
from model_loaders.contract import ModelInfo
from model_loaders.text_side import load_text_side, read_template

logger = logging.getLogger("troupe.loader")

# Tried in this order: the first whose mapping has the model's config.
_AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMultimodalLM",
    "AutoModel",
)


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
) -> ModelInfo:
    """Load a model with its tokenizer or processor.

    Args:
        model_name: Hub id or local folder.
        device: where the model goes, unless `device_map` says otherwise.
        auto_class: name of a transformers class, or package.Class; None chooses the Auto class that knows the config.
        dtype: such as "bfloat16"; None takes the checkpoint's on a GPU, and on a CPU bfloat16 where the processor
            computes with it and the checkpoint is no wider, else float32.
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
        model_kwargs: further arguments of `from_pretrained`.

    Raises:
        ModelLoadFailed: no such class, or the checkpoint cannot be loaded.
    """
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(model_name, **common)
    placement = {"device_map": device_map if device_map is not None else {"": device}}
    optional = {
        "attn_implementation": attn_implementation,
        "quantization_config": _quantization(quantization_config),
    }
    model = _class_for(config, auto_class).from_pretrained(
        model_name,
        config=config,
        dtype=_dtype(dtype, config, device),
        **common,
        **placement,
        **{key: value for key, value in optional.items() if value is not None},
        **(model_kwargs or {}),
    )
    processor, tokenizer = load_text_side(tokenizer_name or model_name, **common)
    return ModelInfo(
        model=model.eval(),
        model_name=model_name,
        processor=processor,
        tokenizer=tokenizer,
        chat_template=read_template(chat_template),
        plain_chat=plain_chat,
        max_model_len=max_model_len,
    )


def _class_for(config: Any, auto_class: str | None) -> Any:
    if auto_class is not None:
        return _named_class(auto_class)
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and hasattr(found, "generate"):
            return found
    remote = getattr(config, "auto_map", None) or {}
    for name in _AUTO_CLASSES:
        candidate = getattr(transformers, name, None)
        if candidate is not None and (name in remote or type(config) in candidate._model_mapping):
            return candidate
    raise ModelLoadFailed(
        f"No Auto class knows model type {config.model_type!r}; name one with auto_class, or write a loader."
    )


def _named_class(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module) if module else transformers, attribute, None)
    except ImportError as error:
        raise ModelLoadFailed(f"auto_class {name!r}: {last_line(error)}") from error
    if found is None:
        place = module or f"transformers {transformers.__version__}"
        raise ModelLoadFailed(f"auto_class {attribute!r} is no class of {place}.")
    return found


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
