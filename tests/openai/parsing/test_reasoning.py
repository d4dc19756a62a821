"""Reasoning split from answers, whole and one character at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.openai.parsing.parts import Call, Content, Part, Reasoning
from deployments.openai.parsing.reader import Reader
from deployments.openai.parsing.syntax import MARKERS, SYNTAXES, AnswerSyntax

THINK = AnswerSyntax(reasoning=MARKERS["think"])

CASES = [
    ("<think>\nhm\n</think>\n\nyes", False, "hm", "yes"),
    ("hm\n</think>\n\nyes", True, "hm", "yes"),
    ("\n<think>hm</think>yes </think> no", False, "hm", "yes </think> no"),
    ("yes", False, "", "yes"),
    ("", False, "", ""),
    ("", True, "", ""),
    ("  yes\n", False, "", "  yes\n"),
    ("yes <think>no</think>", False, "", "yes <think>no</think>"),
    ("<thi", False, "", "<thi"),
    ("<think>never ends\n", False, "never ends", ""),
    ("a </thin b", True, "a </thin b", ""),
    ("a </thin", True, "a </thin", ""),
    ("<think>\nhm</think>yes", True, "hm", "yes"),
    ("<think>\n\n</think>\n\nyes", False, "", "yes"),
    ("<think>a\n\nb</think>", False, "a\n\nb", ""),
]


def split(text: str, opened: bool, pieces: list[str]) -> list[Part]:
    splitter = Reader(THINK, None, reasons=True, begun="<think>" if opened else "")
    parts = [part for piece in pieces for part in splitter.feed(piece)]
    return [*parts, *splitter.finish()]


@pytest.mark.parametrize(("text", "opened", "reasoning", "content"), CASES)
def test_cases(text: str, opened: bool, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        parts = split(text, opened, pieces)
        assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == reasoning
        assert "".join(part.text for part in parts if isinstance(part, Content)) == content


def test_calls_after_reasoning() -> None:
    text = '<think>I <tool_call>will</think>\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    for pieces in ([text], list(text)):
        splitter = Reader(replace(SYNTAXES["hermes"], reasoning=MARKERS["think"]), {}, reasons=True)
        parts = [part for piece in pieces for part in splitter.feed(piece)] + splitter.finish()
        assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == "I <tool_call>will"
        assert [part for part in parts if not isinstance(part, Reasoning)] == [Call("f", '{"a": 1}')]


def test_reasoning_is_given_out_at_once() -> None:
    splitter = Reader(THINK, None, reasons=True)
    assert splitter.feed("<think>\nLet me") == [Reasoning("Let me")]
    assert splitter.feed(" see") == [Reasoning(" see")]
