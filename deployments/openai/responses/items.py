"""The output of a response: items from messages, whole or as the events of a stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from deployments.openai.chat.schema import AssistantMessage, MessageDelta, ToolCallDelta
from deployments.openai.http.streaming import sse
from deployments.openai.responses.schema import FunctionCallItem, Item, MessageItem, OutputText, ReasoningItem, Status


def output_items(message: AssistantMessage, status: Status, logprobs: list[Any]) -> list[Item]:
    """The items of a whole message: reasoning, text, calls. An answer without calls has text, be it empty."""
    items: list[Item] = []
    calls = message.get("tool_calls", [])
    if reasoning := message.get("reasoning_content"):
        items.append(reasoning_item(reasoning, "completed"))
    if message["content"] or not calls:
        items.append(message_item(message["content"] or "", status, logprobs))
    for call in calls:
        items.append(call_item(call["id"], call["function"]["name"], call["function"]["arguments"]))
    return items


def message_item(text: str, status: Status, logprobs: list[Any]) -> MessageItem:
    content = [output_text(text, logprobs)]
    return {"type": "message", "id": _id("msg"), "status": status, "role": "assistant", "content": content}


def output_text(text: str, logprobs: list[Any]) -> OutputText:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def reasoning_item(text: str, status: Status) -> ReasoningItem:
    content: Any = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": _id("rs"), "status": status, "summary": [], "content": content}


def call_item(call_id: str, name: str, arguments: str) -> FunctionCallItem:
    return {
        "type": "function_call",
        "id": _id("fc"),
        "status": "completed",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def _id(kind: str) -> str:
    return f"{kind}_{uuid4().hex}"


class ItemStream:
    """The events by which the items of one answer come into being.

    Attributes:
        items: the items that are done.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._numbers = itertools.count()
        self._open: Any = None
        self._text: list[str] = []
        self._logprobs: list[Any] = []

    def event(self, kind: str, **fields: Any) -> bytes:
        """One event with its number."""
        return sse({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)

    def add(self, delta: MessageDelta, logprobs: list[Any]) -> Iterator[bytes]:
        """The events of what a message gains."""
        if reasoning := delta.get("reasoning_content"):
            yield from self._grow("reasoning", reasoning, [])
        if content := delta.get("content"):
            yield from self._grow("message", content, logprobs)
        for call in delta.get("tool_calls", []):
            yield from self._call(call)

    def finish(self, status: Status) -> Iterator[bytes]:
        """The last events of the items; an answer that had neither text nor calls gets an empty text."""
        if self._open is None and not any(item["type"] != "reasoning" for item in self.items):
            yield from self._begin("message")
        yield from self.close(status)

    def close(self, status: Status) -> Iterator[bytes]:
        """The last events of the item that is open, if one is."""
        if self._open is None:
            return
        item, text = self._open, "".join(self._text)
        at = {**self._place(), "content_index": 0}
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self.event(
                "response.function_call_arguments.done", **self._place(), name=item["name"], arguments=text
            )
            yield from self._done(item)
            self._open = None
            return
        if item["type"] == "message":
            item["content"] = [output_text(text, self._logprobs)]
            yield self.event("response.output_text.done", **at, text=text, logprobs=self._logprobs)
        else:
            item["content"] = [{"type": "reasoning_text", "text": text}]
            yield self.event("response.reasoning_text.done", **at, text=text)
        yield self.event("response.content_part.done", **at, part=item["content"][0])
        yield from self._done(item)
        self._open = None

    def _grow(self, kind: str, text: str, logprobs: list[Any]) -> Iterator[bytes]:
        if self._open is not None and self._open["type"] != kind:
            yield from self.close("completed")
        if self._open is None:
            yield from self._begin(kind)
        self._text.append(text)
        self._logprobs += logprobs
        at = {**self._place(), "content_index": 0, "delta": text}
        if kind == "message":
            yield self.event("response.output_text.delta", **at, logprobs=logprobs)
        else:
            yield self.event("response.reasoning_text.delta", **at)

    def _begin(self, kind: str) -> Iterator[bytes]:
        item: Any = message_item("", "in_progress", []) if kind == "message" else reasoning_item("", "in_progress")
        part = item["content"][0]
        self._open, self._text, self._logprobs = {**item, "content": []}, [], []
        yield self.event("response.output_item.added", output_index=len(self.items), item=self._open)
        yield self.event("response.content_part.added", **self._place(), content_index=0, part=part)

    def _call(self, call: ToolCallDelta) -> Iterator[bytes]:
        """A call begins, or its arguments go on."""
        function = call["function"]
        if "id" in call:
            yield from self.close("completed")
            item = {**call_item(call["id"], function["name"], ""), "status": "in_progress"}
            self._open, self._text, self._logprobs = item, [], []
            yield self.event("response.output_item.added", output_index=len(self.items), item=item)
        if text := function["arguments"]:
            self._text.append(text)
            yield self.event("response.function_call_arguments.delta", **self._place(), delta=text)

    def _done(self, item: Any) -> Iterator[bytes]:
        yield self.event("response.output_item.done", output_index=len(self.items), item=item)
        self.items.append(item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._open["id"], "output_index": len(self.items)}
