"""Answers read by a tokenizer's own response template."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.openai.parsing.parts import Call, Content, Part, Reasoning
from deployments.openai.parsing.response_template import TemplateSplitter, reasoning_markers
from tests.docs.pages import DOCS, blocks

TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "content": {},
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
CALL = '<tool_call>{"name": "f", "arguments": {"a": "1"}}</tool_call>'


def split(pieces: list[str], prompt: str = "hi<|assistant|>") -> list[Part]:
    splitter = TemplateSplitter(TEMPLATE, prompt, TOOLS)
    return [*(part for piece in pieces for part in splitter.feed(piece)), *splitter.finish()]


def told(parts: list[Part]) -> tuple[str, str, list[Any]]:
    """Reasoning, content and calls."""
    calls = [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    return reasoning, "".join(part.text for part in parts if isinstance(part, Content)), calls


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("hello", "<|assistant|>", ("", "hello", [])),
        ("", "<|assistant|>", ("", "", [])),
        (f"<think>hm</think>so{CALL}{CALL}", "<|assistant|>", ("hm", "so", [("f", {"a": 1})] * 2)),
        ("hm</think>yes", "<|assistant|><think>", ("hm", "yes", [])),
        (f"a{CALL}b", "<|assistant|>", ("", "ab", [("f", {"a": 1})])),
        ("x<tool_call>{broken</tool_call>y", "<|assistant|>", ("", "x<tool_call>{broken</tool_call>y", [])),
        ("x<tool_call>[1]</tool_call>", "<|assistant|>", ("", "x<tool_call>[1]</tool_call>", [])),
        (f"{CALL}<tool_call>{{", "<|assistant|>", ("", "<tool_call>{", [("f", {"a": 1})])),
        ("1 < 2 > 0 ] }", "<|assistant|>", ("", "1 < 2 > 0 ] }", [])),
    ],
)
def test_cases(text: str, prompt: str, expected: Any) -> None:
    for pieces in ([text], list(text)):
        assert told(split(pieces, prompt)) == expected


@pytest.mark.parametrize(
    ("field", "markers"),
    [
        ({"open": "<think>", "close": "</think>"}, ("<think>", "</think>")),
        ({"open_pattern": r"\s*<think>\n?", "close_pattern": r"\s*</think>\s*"}, ("<think>", "</think>")),
        ({"open_pattern": r"\[THINK\]", "close_pattern": r"\s*\[/THINK\]\s*"}, ("[THINK]", "[/THINK]")),
        ({"open": "<|channel>thought\n", "close": "<channel|>"}, ("<|channel>thought", "<channel|>")),
        ({"open_pattern": "(?:<a>)?<b>", "close": "</b>"}, None),
        ({"open": "<think>"}, None),
    ],
)
def test_the_markers_of_its_reasoning(field: dict[str, str], markers: tuple[str, str] | None) -> None:
    found = reasoning_markers({"fields": {"content": {}, "thinking": field}})
    assert (None if found is None else (found.opening, found.closing)) == markers
    assert reasoning_markers({"fields": {"content": {}}}) is None


def test_the_description_that_the_page_teaches() -> None:
    (block,) = (block.text for block in blocks(DOCS / "reference" / "parsers.md") if block.language == "python")
    described: dict[str, Any] = {}
    exec(block, described)
    splitter = TemplateSplitter(described["response_template"], "hi<|assistant|>", TOOLS)
    parts = [
        *splitter.feed('<muse>So.</muse>Now.<call>{"name": "f", "arguments": {"a": 1}}</call>'),
        *splitter.finish(),
    ]
    assert told(parts) == ("So.", "Now.", [("f", {"a": 1})])
