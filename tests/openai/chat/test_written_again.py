"""An answer that is sent back is in the next prompt as the model wrote it, if its template writes such answers."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deployments.core.calls import ChatPrompt
from deployments.core.errors import RAISED_BY_HOOKS, TemplateFailed, UnsupportedParameter
from deployments.openai.chat.message import MessageFormat
from deployments.openai.chat.messages import read_messages
from deployments.openai.chat.tools import read_tools
from deployments.openai.parsing import answer_format
from deployments.openai.parsing.rendering import common_prefix
from model_loaders.contract import ModelInfo
from model_loaders.prompts.chat_template import ChatTemplate
from tests.tiny import byte_tokenizer

FOLDER = os.environ.get("ANSWER_FORMATS", "")
FAMILIES = sorted(path.stem for path in Path(FOLDER).glob("*.jsonl")) if FOLDER else []
USER: dict[str, Any] = {"role": "user", "content": "Hello."}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "measure",
            "description": "Measures.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "depth": {"type": "integer"}}},
        },
    }
]
HEAD = "{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>"
END = "<|done|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
CALL = '<do>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments%s }}}</do>'
EACH = "{% for c in m.tool_calls or [] %}"
OBJECT = "{{ m.content or '' }}" + EACH + CALL % " | tojson" + "{% endfor %}"
WRITTEN = '<do>{"name": "measure", "arguments": {"place": "Ilm \\"}]</do>", "depth": 4}}</do>'
OWN = {
    "objects": (OBJECT, WRITTEN),
    "texts": (
        "{% if m.content is string %}{{ m.content }}{% endif %}" + EACH + CALL % "" + "{% endfor %}",
        f"So.{WRITTEN}{WRITTEN}",
    ),
    "thoughts": (
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}" + OBJECT,
        f"<think>How deep?</think>So.{WRITTEN}",
    ),
    "thoughts in parts": (
        "{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for p in m.content %}"
        "{% if p.type == 'thinking' %}<think>{{ p.thinking }}</think>{% else %}{{ p.text }}{% endif %}{% endfor %}"
        "{% endif %}" + EACH + CALL % " | tojson" + "{% endfor %}",
        f"<think>How deep?</think>So.{WRITTEN}",
    ),
    "names of results": (
        "{% if m.role == 'tool' %}{{ m.name }} of {{ m.tool_call_id }}: {% endif %}" + OBJECT,
        f"{WRITTEN}{WRITTEN}",
    ),
}


def ways(message: dict[str, Any], calls: Sequence[tuple[str, Any]]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """An answer in every form that templates read, and the ids of its calls."""
    content, thought = message["content"], message.get("reasoning_content")
    contents: list[dict[str, Any]] = [{"content": content}]
    contents += [{"content": ""}, {}] if not content else []
    thoughts: list[dict[str, Any]] = [{}]
    if thought is not None:
        parts = [{"type": "thinking", "thinking": thought}, *([{"type": "text", "text": content}] if content else [])]
        thoughts = [{"reasoning_content": thought}, {"content": parts}]
    given = [call["id"] for call in message.get("tool_calls", ())]
    named = [f"functions.{name}:{index}" for index, (name, _) in enumerate(calls)]
    for text, said, mused, ids in itertools.product((False, True), contents, thoughts, (given, named)):
        called = [
            {"name": name, "arguments": json.dumps(held, ensure_ascii=False) if text else held} for name, held in calls
        ]
        listed = [{"id": each, "type": "function", "function": call} for each, call in zip(ids, called, strict=True)]
        yield {"role": "assistant", **said, **mused, **({"tool_calls": listed} if listed else {})}, ids


def check(
    template: str, raw: str, calls: Sequence[tuple[str, Any]], tools: Any, special: Any = (), end: str | None = None
) -> str | None:
    """The next prompt after an answer; None if the template is right to refuse it.

    It is the template's own rendering of the conversation, in a form that no other one is nearer to the answer.
    """
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    info = ModelInfo(model=None, tokenizer=tokenizer)
    answers = answer_format(template, special)
    form = MessageFormat(tools=read_tools(tools, "auto", True), answers=answers, reasoning=answers.syntax.reasoning)
    writer = form.writer(end)
    writer.delta(raw, last=True)
    message = json.loads(json.dumps(writer.message()))
    ids = [call["id"] for call in message.get("tool_calls", ())]
    results = [{"role": "tool", "tool_call_id": each, "content": "42"} for each in ids]
    following: list[Any] = results or [{"role": "user", "content": "And?"}]
    messages, _ = read_messages([USER, message, *following])
    try:
        opening = tokenizer.apply_chat_template([USER], tools=tools, tokenize=False, add_generation_prompt=True)
    except RAISED_BY_HOOKS:
        return None  # It cannot write these tools.
    written = opening + raw
    references = {}
    for answer, names in ways(message, calls):
        then = [
            {**result, "tool_call_id": each, "name": call[0]}
            for result, each, call in zip(results, names, calls, strict=False)
        ]
        conversation = [USER, answer, *(then or following)]
        try:
            text = tokenizer.apply_chat_template(conversation, tools=tools, tokenize=False, add_generation_prompt=True)
        except RAISED_BY_HOOKS:
            continue
        if "'thinking':" in text:
            continue  # Not in a form that it reads.
        if all(text.count(name) > written.count(name) - raw.count(name) for name, _ in calls):
            references[text] = len(common_prefix(text, written))
    try:
        prompt = ChatTemplate(info).render(ChatPrompt(messages=messages, tools=tools))
    except (TemplateFailed, UnsupportedParameter):
        assert not references or not any("42" in text for text in references)
        return None
    assert prompt in references
    # Some answers are to prompts that asked for reasoning.
    assert references[prompt] == max(references.values()) or not opening.endswith(end or "")
    return str(prompt)


@pytest.mark.parametrize("name", OWN)
def test_an_answer_is_written_again(name: str) -> None:
    shown, raw = OWN[name]
    count = raw.count("<do>")
    calls = [("measure", {"place": 'Ilm "}]</do>', "depth": 4})] * count
    prompt = check(HEAD + shown + END, raw, calls, TOOLS, end="<|assistant|>")
    assert prompt is not None
    assert f"<|assistant|>{raw}<|done|><|tool|>" in prompt
    assert prompt.count("measure of call_") == (count if name == "names of results" else 0)


@pytest.mark.skipif(not FAMILIES, reason="ANSWER_FORMATS names no folder of answers")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_answers_are_written_again(family: str) -> None:
    template = (Path(FOLDER) / "templates" / f"{family}.jinja").read_text("utf-8")
    lines = [json.loads(line) for line in (Path(FOLDER) / f"{family}.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        calls = [(call["name"], call["arguments"]) for call in line["tool_calls"]]
        names = {name for name, _ in calls}
        tools = [tool for tool in line["tools"] if tool["function"]["name"] in names] or line["tools"][:1]
        check(template, line["raw"], calls, tools, line["special"] or (), line["prompt_end"])


def test_calls_and_results_without_ids_belong_together_in_their_order() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = HEAD + OWN["names of results"][0] + END
    calls = [{"type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("measure", "find")]
    results = [{"role": "tool", "content": content} for content in ("41", "42")]
    messages: list[Any] = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, *results, USER]
    tools = [*TOOLS, {**TOOLS[0], "function": {**TOOLS[0]["function"], "name": "find"}}]
    prompt = ChatTemplate(ModelInfo(model=None, tokenizer=tokenizer)).render(ChatPrompt(messages=messages, tools=tools))
    assert "<|tool|>measure of : 41" in prompt
    assert "<|tool|>find of : 42" in prompt
    assert "<|user|>Hello.<|done|><|assistant|>" in prompt
