"""OpenAI messages as a chat template expects them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.errors import BadRequest
from deployments.openai.fields import shown

_ROLES = {"developer": "system", "agent": "assistant", "function": "tool"}
_ROLE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Fields of an answer that a client sends back with it, and that no template reads.
_ECHOED = ("refusal", "annotations", "audio", "function_call", "provider_specific_fields")

Message = dict[str, Any]


def template_messages(messages: Sequence[object], *, merge_roles: bool = False) -> list[Message]:
    """Messages with roles mapped, text parts joined and tool arguments parsed; everything else as the client sent it.

    Args:
        merge_roles: join neighbours of one role.

    Raises:
        BadRequest: a message is not one; `param` is its place.
    """
    if not messages:
        raise BadRequest("Invalid 'messages': there is none; send at least one.", param="messages")
    read = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return _merged(read) if merge_roles else read


def _message(message: object, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise _bad(place, "input should be an object with role and content", message)
    present = {key: value for key, value in message.items() if value is not None}
    role = present.get("role")
    if not isinstance(role, str) or not _ROLE_NAME.fullmatch(role):
        raise _bad(f"{place}.role", "input should be system, user, assistant or tool", role)
    calls = _tool_calls(present, place)
    read = {key: value for key, value in present.items() if key not in _ECHOED}
    read["role"] = _ROLES.get(role, role)
    read["content"] = _content(present, place, optional=bool(calls) or role == "assistant")
    if "reasoning" in read and "reasoning_content" not in read:
        read["reasoning_content"] = read["reasoning"]
    read.pop("tool_calls", None)
    if calls:
        read["tool_calls"] = calls
    return read


def _content(message: Mapping[str, Any], place: str, *, optional: bool) -> str | list[Any]:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if isinstance(message.get("refusal"), str):
            return str(message["refusal"])
        if optional:
            return ""
        raise BadRequest(
            f"Missing required field '{place}.content'; send a string, \"\" where there is nothing to say.",
            param=f"{place}.content",
            code="missing_required_parameter",
        )
    if not isinstance(content, list):
        raise _bad(f"{place}.content", "input should be a string or a list of parts", content)
    parts = [_part(part, f"{place}.content[{index}]") for index, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(part: object, place: str) -> Message:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise _bad(place, "input should be an object with a type", part)
    field = _TEXT_PARTS.get(part["type"])
    if field is None:
        return dict(part)
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
    arguments = function.get("arguments", {})
    read = {key: value for key, value in call.items() if value is not None}
    read["type"] = "function"
    read["function"] = {**function, "arguments": _arguments(arguments, f"{place}.function.arguments")}
    return read


def _arguments(arguments: object, place: str) -> object:
    """Templates write the arguments as JSON themselves, so they get the object; a text that is none stays a text."""
    if isinstance(arguments, Mapping):
        return arguments
    if not isinstance(arguments, str):
        raise _bad(place, "input should be a string of JSON", arguments)
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _merged(messages: list[Message]) -> list[Message]:
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last and last["role"] == message["role"] and _is_plain(last) and _is_plain(message):
            texts = [text for text in (last["content"], message["content"]) if text]
            merged[-1] = {"role": message["role"], "content": "\n\n".join(texts)}
        else:
            merged.append(message)
    return merged


def _is_plain(message: Message) -> bool:
    return message.keys() == {"role", "content"} and isinstance(message["content"], str)


def _bad(place: str, expected: str, value: object) -> BadRequest:
    return BadRequest(f"Invalid '{place}': {expected}; got {shown(value)}.", param=place)
