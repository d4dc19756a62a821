"""The messages of the Messages API as those of a chat."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from deployments.core.errors import BadRequest, TroupeError, UnsupportedParameter, shown

Part = dict[str, Any]
_PLACE = re.compile(r"(messages\[\d+\])(\.(?:content|tool_calls)\[\d+\])?((?:\.\w+|\[\d+\])*)")


class Conversation:
    """The messages of a chat, made of a request's system prompt and messages.

    Args:
        system: the request's `system`.
        messages: its `messages`.

    Raises:
        BadRequest: a message or a block is malformed.
        UnsupportedParameter: a block is of a type that this server does not have.

    Attributes:
        messages: of the chat.
        continues: the last message is the assistant's, and is continued.
    """

    def __init__(self, system: Any, messages: list[Any]) -> None:
        self.messages: list[dict[str, Any]] = []
        self._places: dict[str, str] = {}
        if system:
            self._add("system", system, "system", self._system_part)
        for index, message in enumerate(messages):
            self._read(message, f"messages[{index}]")
        last = self.messages[-1] if self.messages else {}
        self.continues = last.get("role") == "assistant" and "tool_calls" not in last and bool(last.get("content"))
        if self.continues and isinstance(last["content"], list):
            last["content"] = "".join(part["text"] for part in last["content"])

    def rename(self, error: TroupeError) -> None:
        """Let an error about a message of the chat name the block that it was made of."""
        if not (error.param or "").startswith("messages"):
            return
        error.message = _PLACE.sub(self._place, error.message)
        error.param = _PLACE.sub(self._place, str(error.param))

    def _place(self, found: re.Match[str]) -> str:
        """The request's place of a message, a part or a call of the chat."""
        message, inner, rest = found[1], found[2] or "", found[3]
        if message + inner in self._places:
            return self._places[message + inner] + ("" if inner or self._places[message] == "system" else rest)
        return self._places.get(message, message)

    def _read(self, message: object, place: str) -> None:
        if not isinstance(message, Mapping):
            raise _bad(place, "input should be an object with role and content", message)
        role, content = message.get("role"), message.get("content")
        match role:
            case "user":
                self._user(content, place)
            case "assistant":
                self._assistant(content, place)
            case "system":
                self._add("system", content, place, self._system_part)
            case _:
                raise _bad(f"{place}.role", "input should be user, assistant or system", role)

    def _user(self, content: Any, place: str) -> None:
        """A message for every result of a tool, and one for what stands between them."""
        blocks: list[Any] = []
        begin = 0
        for index, block in enumerate(content if isinstance(content, list) else ()):
            if isinstance(block, Mapping) and block.get("type") == "tool_result":
                if blocks:
                    self._add("user", blocks, place, _part, begin)
                self._result(block, f"{place}.content[{index}]")
                blocks, begin = [], index + 1
            else:
                blocks.append(block)
        if blocks or not isinstance(content, list) or not content:
            self._add("user", blocks or content, place, _part, begin)

    def _result(self, block: Mapping[str, Any], place: str) -> None:
        call_id, content = block.get("tool_use_id"), block.get("content")
        if not isinstance(call_id, str):
            raise _bad(f"{place}.tool_use_id", "input should be the id of a tool_use block", call_id)
        self._add("tool", "" if content is None else content, place, _part)
        message = self.messages[-1]
        message["tool_call_id"] = call_id
        if block.get("is_error"):
            message["content"] = _marked(message["content"])

    def _assistant(self, content: Any, place: str) -> None:
        """Text, thinking and calls of a turn, in one message. Thinking that is encrypted is not for this model."""
        thoughts: list[str] = []
        calls: list[tuple[Part, str]] = []
        texts: list[tuple[Any, str]] = []
        for index, block in enumerate(content if isinstance(content, list) else ()):
            where = f"{place}.content[{index}]"
            kind = block.get("type") if isinstance(block, Mapping) else None
            if kind == "thinking":
                thoughts.append(_string(block, "thinking", where))
            elif kind == "tool_use":
                calls.append((_call(block, where), where))
            elif kind != "redacted_thinking":
                texts.append((block, where))
        self._add("assistant", [], place, _part)
        message, here = self.messages[-1], f"messages[{len(self.messages) - 1}]"
        message["content"] = self._spoken(content, texts, place)
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = [call for call, _ in calls]
        self._places |= {f"{here}.tool_calls[{index}]": where for index, (_, where) in enumerate(calls)}

    @staticmethod
    def _spoken(content: Any, texts: list[tuple[Any, str]], place: str) -> Any:
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise _bad(f"{place}.content", "input should be a string or a list of blocks", content)
        for block, where in texts:
            if not isinstance(block, Mapping) or block.get("type") != "text":
                raise _unknown(block, where)
        return "".join(_string(block, "text", where) for block, where in texts) or None

    def _add(self, role: str, content: Any, place: str, read: Callable[[Any, str], list[Part]], begin: int = 0) -> None:
        """Add a message of a string, or of blocks.

        Args:
            begin: the index of its first block in the request's message.
        """
        here = f"messages[{len(self.messages)}]"
        self._places[here] = place
        parts: Any = content
        if isinstance(content, list):
            parts = []
            for index, block in enumerate(content, begin):
                where = f"{place}[{index}]" if place == "system" else f"{place}.content[{index}]"
                for part in read(block, where):
                    self._places[f"{here}.content[{len(parts)}]"] = where
                    parts.append(part)
        elif not isinstance(content, str):
            raise _bad(
                place if place == "system" else f"{place}.content",
                "input should be a string or a list of blocks",
                content,
            )
        self.messages.append({"role": role, "content": parts})

    @staticmethod
    def _system_part(block: Any, place: str) -> list[Part]:
        if not isinstance(block, Mapping) or block.get("type") != "text":
            raise _bad(place, "input should be a block of type text", block)
        return _part(block, place)


def _part(block: Any, place: str) -> list[Part]:
    """A block of a user's message, or of a tool's result, as parts of a chat's message."""
    match block.get("type") if isinstance(block, Mapping) else None:
        case "text":
            return [{"type": "text", "text": _string(block, "text", place)}]
        case "image":
            return [{"type": "image_url", "image_url": {"url": _image(_source(block, place), f"{place}.source")}}]
        case "document":
            return _document(block, _source(block, place), f"{place}.source")
        case _:
            raise _unknown(block, place)


def _marked(content: str | list[Part]) -> str | list[Part]:
    """The result of a tool that has failed: a chat's message has no field for that."""
    if isinstance(content, str):
        return f"Error: {content}"
    if content and content[0]["type"] == "text":
        return [{"type": "text", "text": f"Error: {content[0]['text']}"}, *content[1:]]
    return [{"type": "text", "text": "Error: "}, *content]


def _image(source: Mapping[str, Any], place: str) -> str:
    match source.get("type"):
        case "base64":
            return f"data:{_string(source, 'media_type', place)};base64,{_string(source, 'data', place)}"
        case "url":
            return _string(source, "url", place)
        case kind:
            raise UnsupportedParameter(
                f"This server does not support '{place}' of type {shown(kind)}; send base64 or url.", param=place
            )


def _document(block: Mapping[str, Any], source: Mapping[str, Any], place: str) -> list[Part]:
    """A document of text: its title and context before it."""
    head = [{"type": "text", "text": f"{block[key]}\n"} for key in ("title", "context") if block.get(key)]
    content = source.get("content")
    match source.get("type"):
        case "text":
            return [*head, {"type": "text", "text": _string(source, "data", place)}]
        case "content" if isinstance(content, str):
            return [*head, {"type": "text", "text": content}]
        case "content" if isinstance(content, list):
            return [*head, *(part for i, each in enumerate(content) for part in _part(each, f"{place}.content[{i}]"))]
        case kind:
            raise UnsupportedParameter(
                f"This server does not support '{place}' of type {shown(kind)}; send its text, or its pages as images.",
                param=place,
            )


def _call(block: Mapping[str, Any], place: str) -> Part:
    given = block.get("input", {})
    if not isinstance(given, Mapping):
        raise _bad(f"{place}.input", "input should be an object", given)
    function = {"name": _string(block, "name", place), "arguments": json.dumps(given, ensure_ascii=False)}
    return {"id": _string(block, "id", place), "type": "function", "function": function}


def _source(block: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    source = block.get("source")
    if not isinstance(source, Mapping):
        raise _bad(f"{place}.source", "input should be an object with a type", source)
    return source


def _string(block: Mapping[str, Any], key: str, place: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise _bad(f"{place}.{key}", "input should be a string", value)
    return value


def _unknown(block: Any, place: str) -> BadRequest:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(kind, str):
        return _bad(place, "input should be a block with a type", block)
    return UnsupportedParameter(f"This server does not support '{place}' of type {shown(kind)}.", param=place)


def _bad(place: str, expected: str, value: object) -> BadRequest:
    return BadRequest(f"Invalid '{place}': {expected}; got {shown(value)}.", param=place)
