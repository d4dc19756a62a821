"""Answers of many families, read as the template shows: whole, at every cut, and in pieces."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deployments.openai.parsing import AnswerFormat, answer_format
from deployments.openai.parsing.parts import Call, Content, Reasoning
from tests.docs.pages import DOCS, blocks

FOLDER = os.environ.get("ANSWER_FORMATS", "")
FAMILIES = sorted(path.stem for path in Path(FOLDER).glob("*.jsonl")) if FOLDER else []
NOT_SHOWN = {"falcon_h1", "gemma3_pythonic", "llama3.2_pythonic", "llama4_pythonic", "phi4_mini", "smollm3"}
"""Families whose templates do not write calls as the model does."""

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "measure",
            "parameters": {"properties": {"place": {"type": "string"}, "depth": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "rest", "parameters": {"properties": {}}}},
]
BOTH = [("measure", {"place": 'Ilm "}]</call>', "depth": 4}), ("rest", {})]
HEAD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
TAIL = "<|done|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
EACH = "{% for c in m.tool_calls or [] %}"
ARGUMENT = "{% for k, v in c.function.arguments.items() %}"
SHOWN = {
    "tags": (
        EACH + "<do>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</do>{% endfor %}",
        '<do>{"name": "measure", "arguments": {"place": "Ilm \\"}]</call>", "depth": 4}}</do>\n'
        '<do>{"name": "rest", "arguments": {}}</do>',
    ),
    "list": (
        "{% if m.tool_calls %}[CALLS]["
        + EACH
        + "{{ {'tool': c.function.name, 'args': c.function.arguments} | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}][/CALLS]{% endif %}",
        '[CALLS][{"tool": "measure", "args": {"place": "Ilm \\"}]</call>", "depth": 4}}, {"tool": "rest", "args": {}}]'
        "[/CALLS]",
    ),
    "key": (
        "{% if m.tool_calls %}<|do|>[" + EACH + "{{ {c.function.name: c.function.arguments} | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}]<|did|>{% endif %}",
        '<|do|>[{"measure": {"place": "Ilm \\"}]</call>", "depth": 4}}, {"rest": {}}]<|did|>',
    ),
    "named": (
        "{% if m.tool_calls %}<|all|>" + EACH + "<|one|>{{ c.id }}<|name|>{{ c.function.name }}<|with|>"
        "{{ c.function.arguments | tojson }}<|end|>{% endfor %}<|over|>{% endif %}",
        '<|all|><|one|>x1<|name|>measure<|with|>{"place": "Ilm \\"}]</call>", "depth": 4}<|end|>'
        "<|one|>y<|name|>rest<|with|>{}<|end|><|over|>",
    ),
    "arguments": (
        EACH + "<run={{ c.function.name }}>\n" + ARGUMENT + "<arg={{ k }}>\n{{ v }}\n</arg>\n{% endfor %}</run>\n"
        "{% endfor %}",
        '<run=measure>\n<arg=place>\nIlm "}]</call>\n</arg>\n<arg=depth>\n4\n</arg>\n</run>\n<run=rest>\n</run>\n',
    ),
    "elements": (
        EACH + "<use><name>{{ c.function.name }}</name>" + ARGUMENT + "<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</use>"
        "{% endfor %}",
        '<use><name>measure</name><place>Ilm "}]</call></place><depth>4</depth></use><use><name>rest</name></use>',
    ),
    "python": (
        "{% if m.tool_calls %}<|py|>[" + EACH + "{{ c.function.name }}(" + ARGUMENT + "{{ k }}={{ v | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]<|/py|>"
        "{% endif %}",
        "<|py|>[measure(place='Ilm \"}]</call>', depth=4), rest()]<|/py|>",
    ),
}

MORE = {
    "lines": (
        "{% if m.tool_calls %}<calls>\n"
        + EACH
        + "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
        "\n{% endfor %}</calls>{% endif %}",
        '<calls>\n{"name": "measure", "arguments": {"place": "Ilm \\"}]</call>", "depth": 4}}\n'
        '{"name": "rest", "arguments": {}}\n</calls>',
    ),
    "quotes": (
        EACH + "<|do|>call:{{ c.function.name }}{ {%- " + ARGUMENT[3:] + "{{ k }}:{% if v is string %}<|q|>{{ v }}<|q|>"
        "{% else %}{{ v }}{% endif %}{% if not loop.last %},{% endif %}{% endfor %}}<|did|>{% endfor %}",
        '<|do|>call:measure{place:<|q|>Ilm "}]</call><|q|>,depth:4}<|did|><|do|>call:rest{}<|did|>',
    ),
    "numbers": (
        "{% if m.tool_calls %}<|calls|>" + EACH + "\n{{ loop.index }}. {{ c.function.name }} "
        "{{ c.function.arguments | tojson }}{% endfor %}\n<|called|>{% endif %}",
        '<|calls|>\n1. measure {"place": "Ilm \\"}]</call>", "depth": 4}\n2. rest {}\n<|called|>',
    ),
    "wrapped": (
        "{% if m.tool_calls %}"
        + '{"tool_calls": ['
        + EACH
        + "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}]}{% endif %}",
        '{"tool_calls": [{"name": "measure", "arguments": {"place": "Ilm \\"}]</call>", "depth": 4}}, '
        '{"name": "rest", "arguments": {}}]}',
    ),
    "separated": (
        EACH + "<|done|>tool call<|then|>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
        "{% endfor %}",
        '<|done|>tool call<|then|>{"name": "measure", "arguments": {"place": "Ilm \\"}]</call>", "depth": 4}}'
        '<|done|>tool call<|then|>{"name": "rest", "arguments": {}}',
    ),
    "unused": (
        "{% if m.tool_calls %}[unused11]["
        + EACH
        + "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}][unused12]{% endif %}",
        '[unused11][{"name": "measure", "arguments": {"place": "Ilm \\"}]</call>", "depth": 4}}, '
        '{"name": "rest", "arguments": {}}][unused12]',
    ),
}


def cuts(text: str) -> Iterator[list[str]]:
    """A text whole, in characters, and in pieces of six kinds."""
    yield [text]
    for size in (1, 2, 3, 5, 9):
        yield [text[i : i + size] for i in range(0, len(text), size)]
    for seed in (1, 2):
        chance, pieces, place = random.Random(seed), [], 0
        while place < len(text):
            size = chance.randint(1, 17)
            pieces.append(text[place : place + size])
            place += size
        yield pieces


def read(
    answers: AnswerFormat, pieces: Sequence[str], tools: Any, prompt_end: str | None
) -> tuple[str, str, list[tuple[str, Any]]]:
    """Content and reasoning with their white space as single blanks, and the calls."""
    reader = answers.reader(tools, prompt_end)
    parts = [part for piece in pieces for part in reader.feed(piece)] + reader.finish()
    content = "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]
    return " ".join(content.split()), " ".join(reasoning.split()), calls


@pytest.mark.parametrize("name", [*SHOWN, *MORE])
def test_a_form_is_found_and_proved(name: str) -> None:
    shown, text = (SHOWN | MORE)[name]
    answers = answer_format(HEAD + shown + TAIL)
    assert (answers.source, answers.is_proved, answers.tried) == ("template", True, 2)
    for pieces in cuts(f"Now.\n{text}<|done|>"):
        assert read(answers, pieces, TOOLS, "<|assistant|>") == ("Now.", "", BOTH)
    for pieces in cuts(text[: text.index("depth")]):
        content, _, calls = read(answers, pieces, TOOLS, "<|assistant|>")
        assert (calls, "Ilm" in content) == ([], True)


def test_the_template_that_the_page_teaches() -> None:
    (template,) = (block.text for block in blocks(DOCS / "reference" / "parsers.md") if block.language == "jinja")
    answers = answer_format(template)
    assert (answers.source, answers.is_proved) == ("template", True)
    for pieces in cuts('Now.<call>measure {"place": "Ilm", "depth": 4}</call><call>rest {}</call><|end|>'):
        assert read(answers, pieces, TOOLS, "<|assistant|>") == (
            "Now.", "", [("measure", {"place": "Ilm", "depth": 4}), ("rest", {})],
        )  # fmt: skip


def test_reasoning_is_found() -> None:
    template = HEAD.replace(
        "{{ m.content", "{% if m.thinking %}<|muse|>{{ m.thinking }}<|mused|>{% endif %}{{ m.content"
    )
    answers = answer_format(template + SHOWN["tags"][0] + TAIL)
    call = '<do>{"name": "rest", "arguments": {}}</do>'
    for pieces in cuts(f"<|muse|>Is {call} it?<|mused|>Yes.{call}"):
        assert read(answers, pieces, TOOLS, "<|assistant|>") == ("Yes.", f"Is {call} it?", [("rest", {})])
    for pieces in cuts(f"So.{call}"):
        assert read(answers, pieces, TOOLS, "<|assistant|><|muse|>") == ("", "So.", [("rest", {})])


def test_a_prompt_may_begin_a_call() -> None:
    shown = "{% if m.content %}>>>all\n{{ m.content }}{% endif %}" + EACH + ">>>{{ c.function.name }}\n"
    shown += "{{ c.function.arguments | tojson }}{% endfor %}"
    answers = answer_format(
        HEAD.replace("{{ m.content or '' }}", shown) + TAIL.replace("<|assistant|>", "<|assistant|>>>>")
    )
    assert answers.is_proved
    call = 'measure\n{"place": "Ilm"}'
    for pieces in cuts(f"all\nNow.>>>{call}"):
        assert read(answers, pieces, TOOLS, "<|assistant|>>>>") == ("Now.", "", [("measure", {"place": "Ilm"})])
    for pieces in cuts(call):
        assert read(answers, pieces, TOOLS, "<|assistant|>>>>") == ("", "", [("measure", {"place": "Ilm"})])
    for pieces in cuts("all\nNow."):
        assert read(answers, pieces, None, "<|assistant|>>>>") == ("Now.", "", [])


def test_reasoning_and_answers_between_tags_that_the_template_names() -> None:
    text = "<think>Is it?</think><answer>Yes.</answer>"
    for told, wanted in (("Write <answer></answer>.", "Yes."), ("", "<answer>Yes.</answer>")):
        answers = answer_format(told + HEAD + TAIL)
        for pieces in cuts(text):
            assert read(answers, pieces, TOOLS, "<|assistant|>") == (wanted, "Is it?", [])
    answers = answer_format("Write <think>, then <Output>." + HEAD + TAIL)
    for pieces in cuts("<think>Is it?</think><Output>Yes.</Output>"):
        assert read(answers, pieces, TOOLS, "<|assistant|>") == ("Yes.", "Is it?", [])
    answers = answer_format(
        HEAD.replace("{{ m.c", "{% if m.reasoning %}◁muse▷{{ m.reasoning }}◁/muse▷{% endif %}{{ m.c") + TAIL
    )
    for pieces in cuts("◁muse▷Is it?◁/muse▷Yes."):
        assert read(answers, pieces, TOOLS, "<|assistant|>") == ("Yes.", "Is it?", [])


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ("Write <fn>{'name': <name>, 'arguments': <arguments>}</fn>.", "<fn>{'name': 'rest', 'arguments': {}}</fn>"),
        (
            "Call with callables[{'name': [name], 'arguments': [arguments]}].",
            'callables[{"name": "rest", "arguments": {}}]',
        ),
        ("Answer [name1(key=value), name2()].", "[rest()]"),
    ],
)
def test_an_instruction_is_followed_without_proof(told: str, text: str) -> None:
    answers = answer_format("{% if tools %}" + told + "{{ tools | tojson }}{% endif %}" + HEAD + TAIL)
    assert (answers.source, answers.is_proved) == ("instruction", False)
    for pieces in cuts(text):
        assert read(answers, pieces, TOOLS, "<|assistant|>") == ("", "", [("rest", {})])


def test_the_vocabulary_shows_a_format() -> None:
    tokens = ["<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<think>", "</think>"]
    answers = answer_format(HEAD + TAIL, special_tokens=tokens)
    assert (answers.source, answers.is_proved) == ("vocabulary", False)
    text = "<think>Hm.</think><|tool_calls_section_begin|><|tool_call_begin|>functions.rest:0"
    text += "<|tool_call_argument_begin|>{}"
    assert read(answers, [text], TOOLS, "<|assistant|>") == ("", "Hm.", [("rest", {})])


CALLED = [("measure", {"place": "Ilm", "depth": 4})]
JSON = '{"name": "measure", "arguments": {"place": "Ilm", "depth": 4}}'
TAGS = '<par name="place" kind="text">Ilm</par><par name="depth" kind="number">4</par>'
UNDECLARED = {
    "JSON": f"<tool_use>{JSON}</tool_use>",
    "a list": f"[TOOL_USES][{JSON}]",
    "Python": "<|my_tool_start|>[measure(place='Ilm', depth=4)]<|my_tool_end|>",
    "doubled brackets": "<<function>>measure(place='Ilm', depth=4)",
    "a name": '<|tool_use|><|tool_name|>measure<|tool_args|>{"place": "Ilm", "depth": 4}<|tool_use_end|>',
    "attributes": f'<my:function_calls>\n<my:invoke name="measure">\n{TAGS}\n</my:invoke>\n</my:function_calls>',
    "keys and values": "<tool_use>measure\n<my_key>place</my_key>\n<my_value>Ilm</my_value>\n<my_key>depth</my_key>\n"
    "<my_value>4</my_value>\n</tool_use>",
    "no markers": JSON,
}


@pytest.mark.parametrize("name", UNDECLARED)
def test_calls_after_markup_that_nothing_shows(name: str) -> None:
    answers, text = answer_format(HEAD + TAIL), UNDECLARED[name]
    assert answers.source == "default"
    for pieces in cuts(f"<deep_think>Hm.</deep_think>Now. {text}"):
        assert read(answers, pieces, TOOLS, "<|assistant|>") == ("Now.", "Hm.", CALLED)
    for pieces in cuts(text[: text.index("4")]):
        assert read(answers, pieces, TOOLS, "<|assistant|>")[2] == []


@pytest.mark.parametrize(
    "text",
    [
        '<form action="measure.php"><input name="place">Ilm</input></form>',
        '<function name="main"><param name="x">1</param></function>',
        'The tool <tool_name>measure</tool_name> takes {"depth": 4}.',
        '<tool_result>{"name": "Ada", "age": 36}</tool_result>',
        '{"name": "Ada", "arguments": {"age": 36}}',
        "std::function<void(int)> f; functools[0]; [x(y)]",
        "<tool <tool><function= [TOOL_",
        "<thinking_cap>On.",
    ],
)
def test_what_only_looks_like_markup_stays_content(text: str) -> None:
    answers = answer_format(HEAD + TAIL)
    for pieces in cuts(text):
        assert read(answers, pieces, TOOLS, "<|assistant|>") == (text, "", [])


def test_a_marker_that_the_prompt_has_written_is_no_content() -> None:
    shown = EACH + ">>>{{ c.function.name }}\n{{ c.function.arguments | tojson }}{% endfor %}"
    shown = "{% if m.content %}>>>all\n{{ m.content }}{% endif %}" + shown
    answers = answer_format(HEAD.replace("{{ m.content or '' }}", shown) + TAIL.replace("t|>", "t|>>>>"))
    for text, wanted in (("Yes, 2 >>> 1.", ("Yes, 2 >>> 1.", [])), (">>>rest\n{}", ("", [("rest", {})]))):
        for pieces in cuts(text):
            content, _, calls = read(answers, pieces, TOOLS, "<|assistant|>>>>")
            assert (content, calls) == wanted


def test_an_answer_of_several_messages() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.reasoning %}<|begin|>assistant<|think|>{{ m.reasoning }}<|end|>{% endif %}"
        "{% if m.tool_calls %}<|begin|>assistant<|tools|>" + EACH + "<|one|>{{ c.function.name }}<|with|>"
        "{{ c.function.arguments | tojson }}<|one_end|>{% endfor %}<|over|>"
        "{% elif m.content %}<|begin|>assistant<|content|>{{ m.content }}<|end|>{% endif %}"
        "{% else %}<|begin|>{{ m.role }}<|content|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|begin|>assistant{% endif %}"
    )
    answers = answer_format(template)
    assert answers.is_proved
    text = "<|think|>Hm.<|end|><|begin|>assistant<|content|>Now.<|end|><|begin|>assistant"
    prompt = "<|begin|>user<|content|>Hi.<|end|><|begin|>assistant"
    for pieces in cuts(text + "<|tools|><|one|>rest<|with|>{}<|one_end|>"):
        assert read(answers, pieces, TOOLS, prompt) == ("Now.", "Hm.", [("rest", {})])


@pytest.mark.parametrize("words", ["", "My reasoning:\n"])
def test_the_prompt_opens_the_reasoning_in_words(words: str) -> None:
    thought = f"{{% if m.reasoning %}}{words}{{{{ m.reasoning }}}}\n[BEGIN ANSWER]\n{{% endif %}}{{{{ m.c"
    answers = answer_format(HEAD.replace("{{ m.c", thought) + TAIL.replace("t|>", "t|>My reasoning:\n"))
    for pieces in cuts("Hm.\n[BEGIN ANSWER]\nYes.\n[END ANSWER]"):
        assert read(answers, pieces, TOOLS, "<|assistant|>My reasoning:\n") == ("Yes.", "Hm.", [])


def test_elements_are_objects_and_lists_if_the_schema_says_so() -> None:
    shown = EACH + '<call name="{{ c.function.name }}">' + ARGUMENT + "<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</call>"
    answers = answer_format(HEAD + shown + "{% endfor %}" + TAIL)
    whole: dict[str, Any] = {"type": "object", "properties": {"deep": {"type": "integer"}}}
    properties = {"at": whole, "of": {"type": "array", "items": {"type": "integer"}}, "as": {"type": "string"}}
    tools = [{"type": "function", "function": {"name": "put", "parameters": {"properties": properties}}}]
    text = '<call name="put"><at><deep>4</deep></at><of><item>1</item><item>2</item></of><as><b>x</b></as></call>'
    for pieces in cuts(text):
        _, _, calls = read(answers, pieces, tools, "<|assistant|>")
        assert calls == [("put", {"at": {"deep": 4}, "of": [1, 2], "as": "<b>x</b>"})]


def test_the_token_that_ends_the_turn_need_not_follow_a_call() -> None:
    shown = "{% if m.tool_calls %}<calls>" + EACH + "{{ {'name': c.function.name, 'arguments': c.function.arguments} "
    shown += "| tojson }}{% endfor %}</calls><|over|>{% endif %}"
    answers = answer_format(
        HEAD + shown + "{% if not m.tool_calls %}<|done|>{% endif %}" + TAIL.replace("<|done|>", "")
    )
    for end in ("", "<|over|>"):
        for pieces in cuts(f'<calls>{{"name": "rest", "arguments": {{}}}}</calls>{end}'):
            assert read(answers, pieces, TOOLS, "<|assistant|>") == ("", "", [("rest", {})])


@pytest.mark.parametrize(
    "template", ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('x') }}", "{%", None]
)
def test_a_template_that_fails_shows_nothing(template: str | None) -> None:
    assert answer_format(template).source == "default"


def typed(value: Any) -> Any:
    """A value with the types of its parts, so that 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return {key: typed(each) for key, each in value.items()}
    return [typed(each) for each in value] if isinstance(value, list) else (type(value), value)


@pytest.mark.skipif(not FAMILIES, reason="ANSWER_FORMATS names no folder of answers")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_as_written(family: str) -> None:
    lines = [json.loads(line) for line in (Path(FOLDER) / f"{family}.jsonl").read_text("utf-8").splitlines()]
    answers = answer_format(
        (Path(FOLDER) / "templates" / f"{family}.jinja").read_text("utf-8"), lines[0]["special"] or ()
    )
    assert answers.is_proved is (family not in NOT_SHOWN)
    for line in lines:
        wanted = [(call["name"], call["arguments"]) for call in line["tool_calls"]]
        for pieces in cuts(line["raw"]):
            content, reasoning, calls = read(answers, pieces, line["tools"], line["prompt_end"])
            assert (typed(calls), reasoning) == (typed(wanted), " ".join((line["reasoning"] or "").split())), line[
                "case"
            ]
            if line.get("kept"):
                assert " ".join(line["kept"].split()) in content, line["case"]
            else:
                assert content == " ".join((line["content"] or "").split()), line["case"]
