"""The objects within a conversation and its tools: messages, their parts and calls, tools, the choice among them.

Their keys are treated as those of a request. What the model's chat template reads counts as known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from deployments.openai.fields.other_servers import Given, Scope, Settled, check_unknown
from deployments.openai.fields.other_servers_objects import (
    ALLOWED,
    BLOCK,
    CALL,
    CALLED,
    CHOICE,
    CHOICE_OF_BLOCKS,
    FLAT_TOOL,
    FUNCTION,
    ITEM,
    MEDIUM,
    MESSAGE,
    MESSAGE_OF_BLOCKS,
    NAMED,
    PART,
    SOURCE,
    TOOL,
    TOOL_OF_BLOCKS,
)

Found = tuple[Given, Scope, str]
_WORD = re.compile(r"\w+")
_MEDIA = ("image_url", "input_audio", "audio_url", "video_url", "file")


def objects_of(fields: Given) -> list[Found]:
    """The objects of a request with the keys they may have and their places.

    Args:
        fields: of a chat, or of the Responses API.
    """
    found = [*_messages(fields.get("messages"), MESSAGE, "messages"), *_messages(fields.get("input"), ITEM, "input")]
    for tool, place in _mappings(fields.get("tools"), "tools"):
        nested = "function" in tool or "input" not in fields
        found += [(tool, TOOL if nested else FLAT_TOOL, place), *_one(tool, "function", FUNCTION, place)]
    return [*found, *_choice(fields.get("tool_choice"))]


def block_objects(fields: Given) -> list[Found]:
    """The same of the Messages API."""
    found: list[Found] = list(_blocks(fields.get("system"), "system"))
    for message, where in _mappings(fields.get("messages"), "messages"):
        found += [(message, MESSAGE_OF_BLOCKS, where), *_blocks(message.get("content"), f"{where}.content")]
    found += [(tool, TOOL_OF_BLOCKS, place) for tool, place in _mappings(fields.get("tools"), "tools")]
    return [*found, *_one(fields, "tool_choice", CHOICE_OF_BLOCKS, "")]


def _blocks(content: Any, place: str) -> Iterator[Found]:
    for block, where in _mappings(content, place):
        yield block, BLOCK, where
        yield from _one(block, "source", SOURCE, where)
        yield from _blocks(block.get("content"), f"{where}.content")


def has_odd_keys(found: list[Found]) -> bool:
    """Whether there are keys other than those of OpenAI's objects."""
    return any(not (scope.own | scope.rows.keys()).issuperset(given) for given, scope, _ in found)


def unread_keys(found: list[Found], template: str | None) -> list[str]:
    """The places of the keys that nobody reads; one for each name, however many objects have it.

    Args:
        template: the source of the chat template, which may read keys of its own; None if a function writes the
            prompt, which may read any that is not nearly a known one.

    Raises:
        UnsupportedParameter: a key asks for something that cannot be done.
        BadRequest: a key is nearly one that is known.
    """
    unread: dict[tuple[int, str], str] = {}
    for given, scope, place in found:
        known = scope.own | scope.rows.keys()
        checked = {key: value for key, value in given.items() if key in known or not _reads(template, key)}
        settled = Settled()
        settled.apply(checked, scope, f"{place}.")
        for where in settled.unknown:
            unread.setdefault((id(scope), where.removeprefix(place)), where)
        check_unknown(len(unread))
    return [] if template is None else list(unread.values())


def _reads(template: str | None, key: str) -> bool:
    if template is None:
        return False
    if _WORD.fullmatch(key):
        return key in _words(template)
    return len(key) <= 100 and re.search(rf"\b{re.escape(key)}\b", template) is not None


@lru_cache(maxsize=16)
def _words(template: str) -> frozenset[str]:
    return frozenset(_WORD.findall(template))


def _mappings(values: Any, place: str) -> Iterator[tuple[Given, str]]:
    """The objects in a list; reading it says what is wrong with the others."""
    for index, value in enumerate(values if isinstance(values, list) else ()):
        if isinstance(value, Mapping):
            yield value, f"{place}[{index}]"


def _one(holder: Given, key: str, scope: Scope, place: str) -> Iterator[Found]:
    value = holder.get(key)
    if isinstance(value, Mapping):
        yield value, scope, f"{place}.{key}".lstrip(".")


def _messages(messages: Any, scope: Scope, place: str) -> Iterator[Found]:
    for message, where in _mappings(messages, place):
        yield message, scope, where
        for part, of_part in _mappings(message.get("content"), f"{where}.content"):
            yield part, PART, of_part
            for medium in _MEDIA:
                yield from _one(part, medium, MEDIUM, of_part)
        for call, of_call in _mappings(message.get("tool_calls"), f"{where}.tool_calls"):
            yield call, CALL, of_call
            yield from _one(call, "function", CALLED, of_call)


def _choice(choice: Any) -> Iterator[Found]:
    if not isinstance(choice, Mapping):
        return
    yield choice, CHOICE, "tool_choice"
    yield from _one(choice, "function", NAMED, "tool_choice")
    yield from _one(choice, "allowed_tools", ALLOWED, "tool_choice")
