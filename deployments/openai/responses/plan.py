"""The items of a Responses request as the messages and tools of a chat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.core.errors import BadRequest, TroupeError, UnsupportedParameter
from deployments.openai.fields.fields import shown
from deployments.openai.fields.sampling import GenerationBody
from deployments.openai.responses.schema import ResponsesBody

_LOGPROBS = "message.output_text.logprobs"
_SHARED = GenerationBody.model_fields.keys() | {"parallel_tool_calls", "chat_template_kwargs"}
# What may be asked for and is never there to include.
_EMPTY_INCLUDES = ("reasoning.encrypted_content",)


def chat_fields(body: ResponsesBody, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the chat request that asks the same.

    Args:
        given: the request's JSON, whose fields that both have are taken over as they are.

    Raises:
        BadRequest: an item, a tool or an option cannot be used.
    """
    shared = {key: value for key, value in given.items() if key in _SHARED}
    translated: dict[str, Any] = {
        "messages": _messages(body),
        "max_tokens": body.max_output_tokens,
        "tools": [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)],
        "tool_choice": _tool_choice(body.tool_choice),
        "reasoning_effort": body.reasoning.effort,
        "response_format": _response_format(body),
        "logprobs": wants_logprobs(body),
    }
    if wants_logprobs(body):
        translated["top_logprobs"] = body.top_logprobs
    return {**shared, **{key: value for key, value in translated.items() if value is not None}}


def wants_logprobs(body: ResponsesBody) -> bool:
    """Whether the text's log-probabilities are asked for.

    Raises:
        UnsupportedParameter: something else is to be included.
    """
    for name in body.include:
        if name not in (_LOGPROBS, *_EMPTY_INCLUDES):
            raise UnsupportedParameter(f"This server does not support including {shown(name)}.", param="include")
    return _LOGPROBS in body.include or bool(body.top_logprobs)


def _response_format(body: ResponsesBody) -> dict[str, Any] | None:
    wanted = body.text.format
    if wanted is None or wanted.type == "text":
        return None
    if body.response_format is not None:
        raise BadRequest(
            "Invalid 'response_format': a text can follow one constraint, and 'text.format' is one already.",
            param="response_format",
        )
    return {"type": wanted.type, "schema": wanted.schema_}


def _tool(tool: object, place: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, Mapping) else tool
        raise UnsupportedParameter(
            f"This server does not support '{place}' of type {shown(kind)}; use functions.", param=f"{place}.type"
        )
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = [_named(tool) for tool in choice.get("tools") or ()]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return _named(choice)


def _named(tool: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.get("name") if isinstance(tool, Mapping) else tool}}


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not body.input:
        raise BadRequest("Invalid 'input': there is no item; send at least one.", param="input")
    return item_messages(body.input, "input", messages)


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
            if message["role"] == "assistant" and _is_open(messages, "content"):
                messages[-1].update(content=message["content"])
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


def _is_open(messages: list[dict[str, Any]], field: str) -> bool:
    """Whether the last message is the assistant's and still lacks a field."""
    return bool(messages) and messages[-1]["role"] == "assistant" and field not in messages[-1]
