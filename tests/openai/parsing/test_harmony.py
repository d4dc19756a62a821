from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.openai.parsing import answer_format
from deployments.openai.parsing.harmony import HarmonySplitter
from deployments.openai.parsing.parts import Call, Content, Part, Reasoning

THOUGHT = "<|channel|>analysis<|message|>They want 4.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>It is 4."
ARGUMENTS = '{"city": "Paris <|x|>"}'


def call(name: str, *, in_role: bool = False) -> str:
    if in_role:
        return f"<|start|>assistant to=functions.{name}<|channel|>commentary json<|message|>{ARGUMENTS}"
    return f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{ARGUMENTS}"


def split(text: str, size: int = 10**6) -> list[Part]:
    """The parts of a text fed in pieces, neighbors of a kind joined."""
    splitter = HarmonySplitter()
    parts: list[Part] = []
    for start in range(0, len(text), size):
        parts += splitter.feed(text[start : start + size])
    joined: list[Part] = []
    for part in [*parts, *splitter.finish()]:
        last = joined[-1] if joined else None
        if not isinstance(part, Call) and isinstance(last, Content | Reasoning) and type(part) is type(last):
            joined[-1] = type(part)(last.text + part.text)
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize("size", [1, 3, 7, 10**6])
def test_channels(size: int) -> None:
    assert split(THOUGHT + FINAL, size) == [Reasoning("They want 4."), Content("It is 4.")]
    assert split(FINAL + "<|return|>", size) == [Content("It is 4.")]
    preamble = "<|start|>assistant<|channel|>commentary<|message|>I look it up.<|end|>"
    assert split(THOUGHT + preamble, size) == [Reasoning("They want 4."), Content("I look it up.")]


@pytest.mark.parametrize("size", [1, 5, 10**6])
@pytest.mark.parametrize("in_role", [False, True])
def test_calls(size: int, in_role: bool) -> None:
    reasoning, found = split(THOUGHT + call("weather", in_role=in_role) + "<|call|>", size)
    assert reasoning == Reasoning("They want 4.")
    assert isinstance(found, Call)
    assert (found.name, json.loads(found.arguments)) == ("weather", json.loads(ARGUMENTS))
    several = split(THOUGHT + call("a") + "<|call|>" + call("b"), size)
    assert [part.name for part in several if isinstance(part, Call)] == ["a", "b"]


def test_what_is_no_call_stays_content() -> None:
    assert split(call("weather").replace(ARGUMENTS, "Paris")) == [Content("Paris")]
    assert split(call("weather").replace(ARGUMENTS, '["Paris"]')) == [Content('["Paris"]')]
    assert split(call("weather")[:-4]) == [Content(ARGUMENTS[:-4])]


@pytest.mark.parametrize("text", ["It is 4.", "to be", "< is less", ""])
def test_a_text_without_channels_is_an_answer(text: str) -> None:
    assert split(text, 1) == ([Content(text)] if text else [])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["analysis", "final", "commentary"]), max_size=5), st.integers(1, 9), st.data())
def test_no_body_is_lost(channels: list[str], size: int, data: st.DataObject) -> None:
    bodies = [data.draw(st.text("ab <|{", max_size=8)) for _ in channels]
    text = "<|end|><|start|>assistant".join(
        f"<|channel|>{channel}<|message|>{body}" for channel, body in zip(channels, bodies, strict=True)
    )
    parts = split(text, size)
    assert "".join(part.text for part in parts if not isinstance(part, Call)) == "".join(bodies)


def test_its_template_is_known() -> None:
    assert answer_format("{{ '<|start|>assistant<|channel|>final<|message|>' }}").syntax.harmony
