"""OpenAI messages as a chat template expects them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.core.errors import BadRequest, shown

_ROLE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Fields of an answer that a client sends back with it, and that no template reads.
_ECHOED = ("refusal", "annotations", "audio", "function_call", "provider_specific_fields")

Message = dict[str, Any]
Media = list[tuple[str, Message]]
"""The parts of a conversation that are not text, with their places."""


def read_messages(messages: Sequence[object]) -> tuple[list[Message], Media]:
    """Messages checked, with their parts of text in one form and everything else as the client sent it; and the parts
    among them that are not text.

    How the model's chat template wants to have them is for the replica to find, which has the template.

    Raises:
        BadRequest: a message is not one; `param` is its place.
    """
    if not messages:
        raise BadRequest("Invalid 'messages': there is none; send at least one.", param="messages")
    media: Media = []
    return [_message(message, f"messages[{index}]", media) for index, message in enumerate(messages)], media


def _message(message: object, place: str, media: Media) -> Message:
    if not isinstance(message, Mapping):
        raise _bad(place, "input should be an object with role and content", message)
    present = {key: value for key, value in message.items() if value is not None}
    role = present.get("role")
    if not isinstance(role, str) or not _ROLE_NAME.fullmatch(role):
        raise _bad(f"{place}.role", "input should be system, user, assistant or tool", role)
    calls = _tool_calls(present, place)
    read = {key: value for key, value in present.items() if key not in _ECHOED}
    read["content"] = _content(present, place, media, optional=bool(calls) or role in ("assistant", "agent"))
    if "reasoning" in read and "reasoning_content" not in read:
        read["reasoning_content"] = read["reasoning"]
    read.pop("tool_calls", None)
    if calls:
        read["tool_calls"] = calls
    return read


def _content(message: Mapping[str, Any], place: str, media: Media, *, optional: bool) -> str | list[Any] | None:
    content = message.get("content")
    if content in (None, "", []) and (spoken := _spoken(message, place)):
        return spoken
    if isinstance(content, str):
        return content
    if content is None:
        if optional:
            return None
        raise BadRequest(
            f"Missing required field '{place}.content'; send a string, \"\" where there is nothing to say.",
            param=f"{place}.content",
            code="missing_required_parameter",
        )
    if not isinstance(content, list):
        raise _bad(f"{place}.content", "input should be a string or a list of parts", content)
    return read_parts(content, f"{place}.content", media)


def read_parts(parts: Sequence[object], place: str, media: Media) -> list[Message]:
    """The parts of a content; those that are not text are added to `media`.

    Raises:
        BadRequest: one is not a part.
    """
    return [_part(part, f"{place}[{index}]", media) for index, part in enumerate(parts)]


def _spoken(message: Mapping[str, Any], place: str) -> str | None:
    """What an answer without a content says: its refusal, or what was heard."""
    audio = message.get("audio")
    heard = audio.get("transcript") if isinstance(audio, Mapping) else None
    if audio is not None and not isinstance(heard, str):
        raise _bad(f"{place}.audio", "this server keeps no recordings; send the content or its transcript", audio)
    refusal = message.get("refusal")
    return refusal if isinstance(refusal, str) and refusal else heard


def _part(part: object, place: str, media: Media) -> Message:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise _bad(place, "input should be an object with a type", part)
    field = _TEXT_PARTS.get(part["type"])
    if field is None:
        media.append((place, dict(part)))
        return media[-1][1]
    if not isinstance(part.get(field), str):
        raise _bad(f"{place}.{field}", "input should be a string", part.get(field))
    return {"type": "text", "text": part[field]}


def _tool_calls(message: Mapping[str, Any], place: str) -> list[Message]:
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        raise _bad(f"{place}.tool_calls", "input should be a list", calls)
    read = [_tool_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls)]
    if not read and "function_call" in message:
        read = [_tool_call({"function": message["function_call"]}, place)]
    return read


def _tool_call(call: object, place: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _bad(place, "input should be a tool call with function.name and function.arguments", call)
    read = {key: value for key, value in call.items() if value is not None}
    read["type"] = "function"
    read["function"] = dict(function)
    return read


def _bad(place: str, expected: str, value: object) -> BadRequest:
    return BadRequest(f"Invalid '{place}': {expected}; got {shown(value)}.", param=place)
