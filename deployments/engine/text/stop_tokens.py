"""Which tokens end a model's text when nothing else does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deployments.core.calls import ChatPrompt
from deployments.core.errors import TroupeError
from deployments.engine.base.text_side import TextSide

_ANSWER = "ANSWERWORD"


def terminator_ids(text_side: TextSide) -> frozenset[int]:
    """The model's own terminators.

    They are those of generation_config (of the config where it has none), the tokenizer's eos token, the loader's
    `stop_token_ids`, and the special token with which the chat template closes an assistant's turn (`<|im_end|>`,
    `<|eot_id|>`, `<end_of_turn>` …), which checkpoints often forget to name.
    """
    info = text_side.info
    found: set[int] = set(_ints(info.stop_token_ids))
    configs = [getattr(info.model, "generation_config", None), getattr(info.model, "config", None)]
    for config in configs:
        named = _ints(getattr(config, "eos_token_id", None))
        found.update(named)
        if named:
            break
    found.update(_ints(getattr(info.tokenizer, "eos_token_id", None)))
    closing = _turn_terminator(text_side)
    if closing is not None:
        found.add(closing)
    return frozenset(found)


def _turn_terminator(text_side: TextSide) -> int | None:
    """The special token that follows an assistant's message in the rendered template."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = text_side.render(ChatPrompt(messages=messages, add_generation_prompt=False))
    except TroupeError:
        return None
    _, found, tail = text.rpartition(_ANSWER)
    if not found:
        return None
    tail = tail.lstrip()
    specials = special_tokens(text_side.info.tokenizer)
    written = [content for content in specials if content and tail.startswith(content)]
    return specials[max(written, key=len)] if written else None


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The content of every special token, added or named, and its id."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    specials = {token.content: int(token_id) for token_id, token in added.items() if token.special}
    contents = getattr(tokenizer, "all_special_tokens", None) or []
    ids = getattr(tokenizer, "all_special_ids", None) or []
    specials.update({str(content): int(token_id) for content, token_id in zip(contents, ids, strict=False)})
    return specials


def _ints(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, int):
        return [value] if value >= 0 else []
    if isinstance(value, Iterable):
        return [int(v) for v in value if v is not None and int(v) >= 0]
    return []
