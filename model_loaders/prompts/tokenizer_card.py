"""The properties of a tokenizer that remote clients need."""

from __future__ import annotations

from typing import Any

from model_loaders.contract import ModelInfo
from model_loaders.prompts.chat_template import ChatTemplate

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def tokenizer_card(info: ModelInfo, template: ChatTemplate) -> dict[str, Any]:
    """The tokenizer's class, special tokens and chat templates, as JSON values; without a tokenizer, Nones.

    `chat_template` is the one of requests without tools, `chat_templates` all that have names, `chat_template_forms`
    what the first was found to read. All three are null if a function writes the prompts: no template would give
    the same.
    """
    tokenizer = info.tokenizer
    card: dict[str, Any] = {"tokenizer_class": None if tokenizer is None else type(tokenizer).__name__}
    for name in _SPECIAL:
        token = getattr(tokenizer, name, None)
        card[name] = None if token is None else str(token)
    card["chat_template"] = template.source()
    card["chat_templates"] = template.choices
    card["chat_template_forms"] = template.describe()
    card["response_template"] = getattr(tokenizer, "response_template", None)
    return card
