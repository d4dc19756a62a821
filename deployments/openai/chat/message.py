"""One choice's text as an assistant message, whole or in deltas."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.core.events import FinishReason
from deployments.core.reasoning import ReasoningMarkers
from deployments.openai.chat.schema import AssistantMessage, FunctionDelta, MessageDelta, ToolCall, ToolCallDelta
from deployments.openai.chat.tools import CallsAlone, ForcedCalls, ToolSet
from deployments.openai.parsing import AnswerFormat
from deployments.openai.parsing.parts import (
    Call,
    CallBegun,
    CallPiece,
    Content,
    ContentSplitter,
    Part,
    Plain,
    Reasoning,
    Splitter,
)
from deployments.openai.parsing.response_template import TemplateSplitter
from deployments.openai.parsing.syntax import HARMONY_BEFORE_CALLS, CallSyntax

_MARKER_OF_CALLS = re.compile(
    r"<[^<>\s]{0,40}(?:tool|func|invoke|call|action)[^<>\s]{0,40}>|\[[A-Z_/]*(?:TOOL|CALL)[A-Z_]*\]", re.IGNORECASE
)
_LEAST = 100
"""Characters of a call after which it is streamed. A shorter one that `max_tokens` cuts off stays text."""
_LETTERS_AND_DIGITS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageFormat:
    """How the text of an answer to one request is read.

    Attributes:
        tools: the tools the model may call; None reads no calls.
        answers: how the model writes.
        template: the tokenizer's own description of its answers, which is used in place of `answers`.
        reasoning: the markers of its reasoning; None leaves it in the content.
        include_reasoning: give the reasoning out.
        constrained: the answer follows a grammar, which begins after the reasoning.
        continued: the prompt ends within a message.
    """

    tools: ToolSet | None = None
    answers: AnswerFormat | None = None
    template: Mapping[str, Any] | None = None
    reasoning: ReasoningMarkers | None = None
    include_reasoning: bool = True
    constrained: bool = False
    continued: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that the reader looks for, which must not be left out of the answer as special tokens."""
        if self.answers is None:
            return ()
        forced = self._is_forced and self.call_syntax is None
        return self.answers.syntax.markers(calls=self.tools is not None and not forced)

    @property
    def call_syntax(self) -> CallSyntax | None:
        """The form in which calls can be forced; None if it was not proved.

        In a format of channels the answer's header decides whether there is a call, so that all answers have to be one.
        """
        answers = self.answers
        if answers is None or not answers.is_proved or not answers.syntax.calls:
            return None
        return None if answers.syntax.harmony and not self._is_forced else answers.syntax.calls[0]

    @property
    def before_answer(self) -> ReasoningMarkers | None:
        """The markers of the reasoning, after which a grammar begins."""
        in_channels = self.answers is not None and self.answers.syntax.harmony
        return HARMONY_BEFORE_CALLS if in_channels and self.call_syntax is not None else self.reasoning

    @property
    def _is_forced(self) -> bool:
        return self.tools is not None and self.tools.forced

    @property
    def short_ids(self) -> bool:
        """Whether ids of calls have nine letters and digits, as the model's template insists."""
        return self.answers is not None and self.answers.syntax.short_ids

    def writer(self, prompt: str | None, *, stream: bool = False) -> MessageWriter:
        """What makes a message of the text of one choice.

        Args:
            prompt: the rendered prompt, which may have opened the reasoning.
            stream: give out the arguments of calls while they are written.
        """
        return MessageWriter(self, self._splitter(prompt, stream))

    def _splitter(self, prompt: str | None, stream: bool) -> Splitter:
        least = (0 if self._is_forced else _LEAST) if stream else None
        if self.tools is not None and self._is_forced and self.call_syntax is not None and self.answers is not None:
            return CallsAlone(self.answers.splitter(self.tools.schemas, prompt, continued=self.continued, least=least))
        forced = ForcedCalls(self.tools, least) if self.tools is not None and self._is_forced else None
        read: Splitter = Plain()
        if self.template is not None:
            read = TemplateSplitter(self.template, prompt, () if self.tools is None else self.tools.definitions)
        elif self.answers is not None:
            schemas = self.tools.schemas if self.tools is not None and forced is None else None
            read = self.answers.splitter(
                schemas, prompt, continued=self.continued, constrained=self.constrained, least=least
            )
        return read if forced is None else ContentSplitter(read, forced)


class MessageWriter:
    """The message of one choice, from its parts.

    Attributes:
        calls: tool calls so far.
    """

    def __init__(self, answer_format: MessageFormat, splitter: Splitter) -> None:
        self.calls: list[ToolCall] = []
        self._format = answer_format
        self._splitter = splitter
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._left_out = False

    def delta(self, text: str, *, last: bool) -> MessageDelta:
        """What the message gains by more text; `last` adds what was held back."""
        parts = self._splitter.feed(text)
        if last:
            parts += self._splitter.finish()
        return self._add(parts)

    def message(self, opening: str = "") -> AssistantMessage:
        """The whole message; `opening` is a beginning that the request brought."""
        content = opening + "".join(self._content)
        message: AssistantMessage = {
            "role": "assistant",
            "content": content if content or not (self.calls or self._reasoning) else None,
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning_content"] = message["reasoning"] = "".join(self._reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        return message

    @property
    def unread(self) -> str | None:
        """A marker of calls that is in the content, because the call could not be read."""
        if self._format.tools is None:
            return None
        found = _MARKER_OF_CALLS.search("".join(self._content))
        return None if found is None else found[0]

    def finish_reason(self, reason: FinishReason) -> FinishReason:
        return "tool_calls" if self.calls and reason == "stop" else reason

    def _add(self, parts: Sequence[Part]) -> MessageDelta:
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[ToolCallDelta] = []
        for part in parts:
            match part:
                case Content():
                    content.append(part.text)
                case Reasoning():
                    reasoning.append(part.text)
                case Call():
                    calls.extend(self._call(part))
                case CallBegun():
                    calls.extend(self._call(Call(part.name, "")))
                case CallPiece():
                    calls.extend(self._piece(part.text))
        return self._delta(content, reasoning if self._format.include_reasoning else [], calls)

    def _delta(self, content: list[str], reasoning: list[str], calls: list[ToolCallDelta]) -> MessageDelta:
        delta: MessageDelta = {}
        self._content += content
        self._reasoning += reasoning
        if reasoning:
            delta["reasoning_content"] = delta["reasoning"] = "".join(reasoning)
        if content:
            delta["content"] = "".join(content)
        if calls:
            delta["tool_calls"] = _merged(calls)
        return delta

    def _call(self, call: Call) -> list[ToolCallDelta]:
        tools = self._format.tools
        self._left_out = tools is not None and not tools.parallel and bool(self.calls)
        if self._left_out:
            return []
        whole: ToolCall = {
            "id": _call_id(self._format.short_ids),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        self.calls.append(whole)
        function: FunctionDelta = {"name": call.name, "arguments": call.arguments}
        return [{"index": len(self.calls) - 1, "id": whole["id"], "type": "function", "function": function}]

    def _piece(self, text: str) -> list[ToolCallDelta]:
        """More of the arguments of the last call."""
        if self._left_out:
            return []
        self.calls[-1]["function"]["arguments"] += text
        return [{"index": len(self.calls) - 1, "function": {"arguments": text}}]


def _merged(calls: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
    """With one entry for each call."""
    merged: list[ToolCallDelta] = []
    for call in calls:
        if merged and merged[-1]["index"] == call["index"]:
            merged[-1]["function"]["arguments"] += call["function"]["arguments"]
        else:
            merged.append(call)
    return merged


def _call_id(short: bool) -> str:
    """An id as OpenAI writes them, or as Mistral's templates want them."""
    if short:
        return "".join(secrets.choice(_LETTERS_AND_DIGITS) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
