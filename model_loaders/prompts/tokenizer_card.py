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
    card["special_tokens"], card["markers"] = marker_tokens(tokenizer)
    card["response_template"] = info.described_answers
    return card


def tokens_of(tokenizer: Any) -> list[str]:
    """The texts of the tokens that may be markers."""
    special, added = marker_tokens(tokenizer)
    return [*special, *added]


def marker_tokens(tokenizer: Any) -> tuple[list[str], list[str]]:
    """The texts of the special tokens, and of the tokens that were added for markers and are not special."""
    special = list(map(str, getattr(tokenizer, "all_special_tokens", None) or ()))
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    tokens = [(str(token), bool(getattr(token, "special", False))) for token in added.values()]
    special += [text for text, is_special in tokens if is_special and text not in special]
    return special, [text for text, is_special in tokens if not is_special]
