"""Splits the answers of models whose tokenizer has a `response_template`, with transformers' own parser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.core.reasoning import ReasoningMarkers
from deployments.openai.parsing.calls import json_calls
from deployments.openai.parsing.parts import Content, Part, Reasoning

NAME = "response_template"
_REASONING = ("thinking", "reasoning", "reasoning_content")
# Markers end with these, so that a piece seldom holds more than one end of a region.
# White space that a pattern leaves open at either end, and what makes a pattern more than a text.
_SPACES = re.compile(r"^(?:\\[sn][*?])+|(?:\\[sn][*?])+$")
_SYNTAX = re.compile(r"[][.^$*+?{}|()\\]")
_PIECES = re.compile(r"[^>\]}]*[>\]}]|[^>\]}]+")


def importable() -> None:
    """Import the parser, which takes half a second the first time."""
    import transformers.utils.chat_parsing  # noqa: F401


def reasoning_markers(template: Mapping[str, Any]) -> ReasoningMarkers | None:
    """The markers of the reasoning that a template describes; None if there are none, or they are not plain texts."""
    fields = template.get("fields")
    for name in _REASONING:
        field = fields.get(name) if isinstance(fields, Mapping) else None
        if isinstance(field, Mapping):
            opening, closing = _literal(field, "open"), _literal(field, "close")
            return ReasoningMarkers(opening, closing) if opening and closing else None
    return None


def _literal(field: Mapping[str, Any], key: str) -> str | None:
    """A marker without the white space around it: given as a text, or as a pattern that matches one text."""
    text = field.get(key)
    if isinstance(text, str):
        return text.strip()
    pattern = field.get(f"{key}_pattern")
    core = _SPACES.sub("", pattern) if isinstance(pattern, str) else ""
    literal = re.sub(r"\\(\W)", r"\1", core)
    return literal.strip() if core and not _SYNTAX.search(re.sub(r"\\\W", "", core)) else None


class TemplateSplitter:
    """Splits by the regions of a response template. What the parser cannot read stays content, markers included.

    Args:
        template: the tokenizer's `response_template`.
        prompt: the rendered prompt, which may have begun the message.
        tools: the request's tools, whose schemas give arguments their types.
    """

    def __init__(self, template: Mapping[str, Any], prompt: str | None, tools: Sequence[Mapping[str, Any]]) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self._parser = ResponseParser(dict(template), prefix=prompt or "", tools=[dict(tool) for tool in tools])
        self._broken = False
        # The text that is in no part yet.
        self._pending = ""

    def feed(self, text: str) -> list[Part]:
        parts: list[Part] = []
        for piece in _PIECES.findall(text):
            self._pending += piece
            if self._broken:
                parts += self._give_up()
                continue
            try:
                parts += self._read(self._parser.feed(piece))
            except (ValueError, TypeError, KeyError, RecursionError):
                parts += self._give_up()
        return parts

    def finish(self) -> list[Part]:
        if self._broken:
            return []
        try:
            _, events = self._parser.finalize()
            return self._read(events)
        except (ValueError, TypeError, KeyError, RecursionError):
            return self._give_up()

    def _read(self, events: list[dict[str, Any]]) -> list[Part]:
        parts: list[Part] = []
        for event in events:
            field, kind = event["field"], event["type"]
            if kind == "region_chunk" and field == "content":
                parts.append(Content(self._taken(event["text"])))
            elif kind == "region_chunk" and field in _REASONING:
                parts.append(Reasoning(self._taken(event["text"])))
            elif kind == "region_close" and field == "tool_calls":
                calls = json_calls(event["value"])
                if not calls:
                    raise ValueError("no tool call")
                parts += calls
                self._pending = ""
        return parts

    def _taken(self, text: str) -> str:
        self._pending = self._pending.partition(text)[2]
        return text

    def _give_up(self) -> list[Part]:
        self._broken, rest, self._pending = True, self._pending, ""
        return [Content(rest)] if rest else []
