"""Joins consecutive messages of the same role, for templates that require alternating roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model_loaders.prompts.message_forms import Message, as_parts


def merged(messages: Sequence[Message]) -> list[Message]:
    """Messages, with consecutive messages of the same role joined."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last and last["role"] == message["role"] and _is_plain(last) and _is_plain(message):
            joined[-1] = {"role": message["role"], "content": _together(last["content"], message["content"])}
        else:
            joined.append(message)
    return joined


def _is_plain(message: Message) -> bool:
    return message.keys() == {"role", "content"} and isinstance(message["content"], str | list)


def _together(first: Any, second: Any) -> Any:
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*as_parts(first), {"type": "text", "text": "\n\n"}, *as_parts(second)]
