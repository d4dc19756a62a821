"""Writes tools, calls and results as text, for chat templates that have no place for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deployments.core.calls import ChatPrompt
from model_loaders.prompts.merging import merged
from model_loaders.prompts.message_forms import Message, as_parts
from model_loaders.prompts.template_coverage import begins_with_system

_TOLD = """You can call functions. Each line is one of them, with a JSON schema of its arguments:
{tools}
To call a function, write its name and its arguments as JSON, between these tags:
<tool_call>
{{"name": "NAME", "arguments": {{}}}}
</tool_call>
Write such a block for each call. The next message has the results."""


def with_written_tools(chat: ChatPrompt) -> ChatPrompt:
    """A conversation with its tools in the system text, its calls in the answers, and their results from the user."""
    told = _TOLD.format(tools="\n".join(_json(tool.get("function", tool)) for tool in chat.tools or ()))
    messages = [_written(message) for message in chat.messages]
    if begins_with_system(messages):
        messages[0] = {**messages[0], "content": _joined(messages[0].get("content"), told, "\n\n")}
    else:
        messages.insert(0, {"role": "system", "content": told})
    return replace(chat, messages=_together(messages, chat.messages), tools=None)


def _written(message: Mapping[str, Any]) -> Message:
    """A message without calls, and not of a tool."""
    if message["role"] == "tool":
        content = message.get("content")
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    text = "\n".join(f"<tool_call>\n{_call(call['function'])}\n</tool_call>" for call in calls)
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": _joined(message.get("content"), text, "\n")}


def _call(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments")
    written = arguments if isinstance(arguments, str) else _json(arguments or {})
    return f'{{"name": {_json(function["name"])}, "arguments": {written.strip() or "{}"}}}'


def _joined(content: Any, text: str, between: str) -> Any:
    """A content, then a text."""
    if isinstance(content, list):
        return [*as_parts(content), {"type": "text", "text": between + text}]
    return f"{content}{between}{text}" if content else text


def _together(messages: Sequence[Message], given: Sequence[Mapping[str, Any]]) -> list[Message]:
    """With the results of one answer's calls in one message."""
    first = len(messages) - len(given)
    joined: list[Message] = [*messages[:first]]
    for index, message in enumerate(messages[first:]):
        if index and given[index]["role"] == given[index - 1]["role"] == "tool":
            joined[-1:] = merged([joined[-1], message])
        else:
            joined.append(message)
    return joined


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
