"""The harmony format of gpt-oss: messages with a channel each, in which the model thinks, calls and answers.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…
    … <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}

The format is OpenAI's: https://github.com/openai/harmony/blob/main/docs/format.md. The tokens that end a turn
(`<|return|>`, `<|call|>`) end the text, so they are seldom part of it.
"""

from __future__ import annotations

from typing import Literal

import regex

from deployments.openai.parsing.cursor import Scan, either
from deployments.openai.parsing.parts import Call, Content, Part, Reasoning
from deployments.openai.parsing.typed import dumps, loads

_MESSAGE = "<|message|>"
_ENDS = Scan({"end": either(("<|end|>", "<|call|>", "<|return|>", "<|start|>"))})
_OPENINGS = ("<|channel|>", "<|start|>", "<|constrain|>", "to=")
_CHANNEL = regex.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = regex.compile(r"to=([^\s<]+)")

_Kind = Literal["header", "reasoning", "content", "call"]


class HarmonySplitter:
    """Splits by channel: `analysis` is reasoning, a message to a function is a call, the rest is content.

    Headers are markup and are dropped; if a message to a function is not a JSON object, its text stays content.

    Args:
        calls: there are tools to call.
        only_final: content is in `final` alone, because it follows a grammar; all else is reasoning.
    """

    def __init__(self, *, calls: bool = True, only_final: bool = False) -> None:
        self._calls = calls
        self._only_final = only_final
        self._kind: _Kind | None = None
        self._name = ""
        self._buffer = ""
        self._final = False

    def feed(self, text: str) -> list[Part]:
        self._buffer += text
        parts: list[Part] = []
        if self._kind is None and not self._decide() and not self._final:
            return parts
        while self._in_header() if self._kind == "header" else self._in_body(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        self._final = True
        return self.feed("")

    def _decide(self) -> bool:
        """See whether the text begins with a header: what the prompt has begun already goes on without one."""
        begun = self._buffer.lstrip()
        if any(begun.startswith(opening) for opening in _OPENINGS):
            self._kind = "header"
        elif not any(opening.startswith(begun) for opening in _OPENINGS):
            self._kind = "content"
        return self._kind is not None

    def _in_header(self) -> bool:
        header, marker, body = self._buffer.partition(_MESSAGE)
        if not marker:
            return False
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        self._buffer, self._name = body, recipient[1] if recipient else ""
        named = "" if channel is None else channel[1]
        if self._only_final:
            self._kind = "content" if named == "final" else "reasoning"
        elif self._calls and self._name.startswith("functions."):
            self._kind = "call"
        else:
            self._kind = "reasoning" if named == "analysis" else "content"
        return True

    def _in_body(self, parts: list[Part]) -> bool:
        """Give out what is certain; whether a message has ended."""
        found, size = _ENDS.next(self._buffer, self._final)
        if found is None and self._kind == "call" and not self._final:
            return False
        parts += self._whole(self._kind, self._buffer[:size])
        self._buffer = self._buffer[size:] if found is None else self._buffer[found.end() :]
        self._kind = self._kind if found is None else "header"
        return found is not None

    def _whole(self, kind: _Kind | None, body: str) -> list[Part]:
        if kind == "call" and isinstance(arguments := loads(body), dict):
            return [Call(self._name.removeprefix("functions."), dumps(arguments))]
        if not body:
            return []
        return [Reasoning(body) if kind == "reasoning" else Content(body)]
