"""The content of an answer: blocks from a message, whole or as the events of a stream."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from deployments.openai.chat.schema import AssistantMessage, MessageDelta
from deployments.openai.http.streaming import sse
from deployments.openai.messages.schema import Block, TextBlock, ThinkingBlock, ToolUseBlock


def content_blocks(message: AssistantMessage) -> list[Block]:
    """The blocks of a whole message: thinking, text, calls; none if it says nothing."""
    blocks: list[Block] = []
    if reasoning := message.get("reasoning_content"):
        blocks.append(_thinking(reasoning, _signature(reasoning)))
    if text := message["content"]:
        blocks.append(_text(text))
    for call in message.get("tool_calls", []):
        function = call["function"]
        blocks.append(_tool_use(call["id"], function["name"], _input(function["arguments"])))
    return blocks


class BlockStream:
    """The events by which the blocks of one answer come into being."""

    def __init__(self) -> None:
        self._index = -1
        self._open = ""
        self._thought: list[str] = []

    def add(self, delta: MessageDelta) -> Iterator[bytes]:
        """The events of what a message gains."""
        if reasoning := delta.get("reasoning_content"):
            yield from self._grow("thinking", reasoning)
        if content := delta.get("content"):
            yield from self._grow("text", content)
        for call in delta.get("tool_calls", []):
            yield from self._call(call["id"], call["function"]["name"], call["function"]["arguments"])

    def close(self) -> Iterator[bytes]:
        """The last events of the block that is open, if one is."""
        if not self._open:
            return
        if self._open == "thinking":
            yield self._delta("signature_delta", signature=_signature("".join(self._thought)))
        yield event("content_block_stop", index=self._index)
        self._open, self._thought = "", []

    def _grow(self, kind: str, text: str) -> Iterator[bytes]:
        if self._open != kind:
            yield from self._begin(kind, _text("") if kind == "text" else _thinking("", ""))
        if kind == "thinking":
            self._thought.append(text)
        yield self._delta(f"{kind}_delta", **{kind: text})

    def _call(self, call_id: str, name: str, arguments: str) -> Iterator[bytes]:
        yield from self._begin("tool_use", _tool_use(call_id, name, {}))
        yield self._delta("input_json_delta", partial_json=json.dumps(_input(arguments), ensure_ascii=False))
        yield from self.close()

    def _begin(self, kind: str, block: Block) -> Iterator[bytes]:
        yield from self.close()
        self._index += 1
        self._open = kind
        yield event("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: str, **fields: str) -> bytes:
        return event("content_block_delta", index=self._index, delta={"type": kind, **fields})


def event(kind: str, **fields: Any) -> bytes:
    """One event of a stream."""
    return sse({"type": kind, **fields}, kind)


def _text(text: str) -> TextBlock:
    return {"type": "text", "text": text, "citations": None}


def _thinking(text: str, signature: str) -> ThinkingBlock:
    return {"type": "thinking", "thinking": text, "signature": signature}


def _tool_use(call_id: str, name: str, given: dict[str, Any]) -> ToolUseBlock:
    # Some templates insist on short ids, which are given back as they are.
    own = f"toolu_{call_id.removeprefix('call_')}" if call_id.startswith("call_") else call_id
    return {"type": "tool_use", "id": own, "name": name, "input": given}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call, which are an object in this API."""
    try:
        value = json.loads(arguments)
    except ValueError:
        value = arguments
    return value if isinstance(value, dict) else {"input": value}


def _signature(text: str) -> str:
    """An opaque text that clients send back with the thinking; this server does not check it."""
    return base64.b64encode(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=24).digest()).decode()
