"""The items of a Responses request as the messages of a chat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.core.errors import BadRequest, TroupeError, UnsupportedParameter, shown


def item_messages(items: Sequence[object], param: str, messages: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Items as the messages of a chat.

    Args:
        param: the request field that holds the items.
        messages: those that stand before them.

    Raises:
        BadRequest: an item is none, or of a kind that cannot be used.
    """
    read = list(messages)
    for index, item in enumerate(items):
        _add_item(read, item, f"{param}[{index}]")
    return read


def _add_item(messages: list[dict[str, Any]], item: object, place: str) -> None:
    """Add an item; reasoning, text and calls of one turn of the assistant become one message."""
    if not isinstance(item, Mapping):
        raise BadRequest(f"Invalid '{place}': input should be an object; got {shown(item)}.", param=place)
    match item.get("type", "message"):
        case "message":
            message = {"role": item.get("role"), "content": item.get("content")}
            last = messages[-1] if messages else {}
            if message["role"] == "assistant" == last.get("role") and "content" not in last:
                last["content"] = message["content"]
            else:
                messages.append(message)
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            messages[-1].setdefault("tool_calls", []).append(call)
        case "function_call_output":
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        case "reasoning":
            text = "".join(part.get("text", "") for part in item.get("content") or () if isinstance(part, Mapping))
            messages.append({"role": "assistant", "reasoning_content": text})
        case kind:
            raise UnsupportedParameter(f"This server does not support '{place}' of type {shown(kind)}.", param=place)


def name_items(error: TroupeError, given: Any, instructions: object = None) -> None:
    """Let an error about the messages of a chat name the items that they were made of.

    Args:
        given: the request's `input`.
        instructions: its instructions, which stand before them.
    """
    if not (error.param or "").startswith("messages"):
        return
    places = _places(given, instructions)

    def item(found: re.Match[str]) -> str:
        message, call, field = found[1], found[2] or "", found[3] or ""
        place = places.get(message + call) or places.get(message, "input")
        if place in ("input", "instructions"):
            return place
        if call:
            return place + field.replace(".function", "")
        return place + (field.replace(".content", ".output") if places.get(f"{message}.content") == "output" else field)

    pattern = r"(messages\[\d+\])(\.tool_calls\[\d+\])?((?:\.\w+)*)"
    error.message = re.sub(pattern, item, error.message)
    error.param = "input" if error.param == "messages" else re.sub(pattern, item, str(error.param))


def _places(given: Any, instructions: object) -> dict[str, str]:
    """By message or call of the chat: the item that it was made of."""
    messages: list[dict[str, Any]] = [{"role": "system"}] if instructions else []
    places = {"messages[0]": "instructions"} if instructions else {}
    for index, item in enumerate(given if isinstance(given, list) else ()):
        _add_item(messages, item, f"input[{index}]")
        message = f"messages[{len(messages) - 1}]"
        match item.get("type", "message"):
            case "function_call":
                places[f"{message}.tool_calls[{len(messages[-1]['tool_calls']) - 1}]"] = f"input[{index}]"
                places.setdefault(message, f"input[{index}]")
            case "function_call_output":
                places |= {message: f"input[{index}]", f"{message}.content": "output"}
            case _:
                places[message] = f"input[{index}]"
    return places
