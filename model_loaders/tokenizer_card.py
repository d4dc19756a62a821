"""What a client needs to know of a tokenizer to use it from afar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_loaders.contract import ModelInfo

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def tokenizer_card(info: ModelInfo) -> dict[str, Any]:
    """The tokenizer's class, special tokens and chat template, as JSON values; without a tokenizer, Nones.

    The chat template is null where the loader's own hook writes the prompts, because no template would give the same.
    """
    tokenizer = info.tokenizer
    card: dict[str, Any] = {"tokenizer_class": None if tokenizer is None else type(tokenizer).__name__}
    for name in _SPECIAL:
        token = getattr(tokenizer, name, None)
        card[name] = None if token is None else str(token)
    card["chat_template"] = None if info.apply_chat_template is not None else _chat_template(info)
    card["response_template"] = getattr(tokenizer, "response_template", None)
    return card


def _chat_template(info: ModelInfo) -> str | None:
    for template in (
        info.chat_template,
        getattr(info.processor, "chat_template", None),
        getattr(info.tokenizer, "chat_template", None),
    ):
        if isinstance(template, Mapping):
            template = template.get("default")
        if isinstance(template, str):
            return template
    return None
