"""Formats that no list names are found, proved and read: what counts is how they are found."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.openai.parsing import answer_format
from tests.openai.parsing.invented import FORMATS, Calls
from tests.openai.parsing.test_formats import CALLED, EACH, HEAD, JSON, SHOWN, TAIL, cuts, read, typed
from tests.openai.parsing.test_formats import TOOLS as TWO_TOOLS

KINDS = {"place": "string", "depth": "integer", "share": "number", "sure": "boolean", "code": "string", "of": "array"}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"properties": {k: {"type": KINDS[k]} for k in keys}}},
    }
    for name, keys in {"measure": KINDS, "rest": ()}.items()
]
ONE: Calls = [("measure", {"place": "Øvre Ilm", "depth": 4})]
CALLS: dict[str, Calls] = {
    "one": ONE,
    "two": [*ONE, ("measure", {"place": "Bergen"})],
    "no arguments, twice": [("rest", {}), ("rest", {})],
    "types": [
        ("measure", {"place": "Ilm", "depth": 4, "share": 0.5, "sure": True, "code": "0150", "of": ["a, b", "ü"]})
    ],
    "a hard text": [("measure", {"place": 'if (a[0] > {b}) { print("<b>x</b>"); }'})],
}


@pytest.mark.parametrize("name", FORMATS)
def test_an_invented_format_is_read(name: str) -> None:
    form = FORMATS[name]
    answers = answer_format(form.template)
    assert (answers.source, answers.is_proved) == (form.found_by, form.found_by == "template")
    thought = f"{form.opening}Hm.{form.closing}"
    # Where the prompt opens the reasoning, every answer has it.
    for begun, reasoning in [(thought, "Hm.")] if not form.opening else [("", ""), (thought, "Hm.")]:
        for calls in CALLS.values():
            for said in ("", "Now."):
                text = f"{form.before}{said}{form.after}\n" if said else ""
                for pieces in cuts(f"{begun}{text}{form.write(calls)}"):
                    content, thoughts, found = read(answers, pieces, TOOLS, form.prompt)
                    assert (content, thoughts, typed(found)) == (said, reasoning, typed(calls))


@pytest.mark.parametrize("name", FORMATS)
def test_an_invented_format_makes_no_calls_up(name: str) -> None:
    form = FORMATS[name]
    answers = answer_format(form.template)
    thought = f"{form.opening}Hm.{form.closing}" if not form.opening else ""
    call = form.write(ONE)
    for pieces in cuts(thought + call[: call.index("Ilm")]):
        content, _, calls = read(answers, pieces, TOOLS, form.prompt)
        assert (calls, "Øvre" in content) == ([], True)
    for said in ('{"name": "Ada", "age": 36}', "[a](b) - x: 1 <b>c</b> measure (place) ```python x```"):
        for pieces in cuts(f"{thought}{form.before}{said}"):
            content, _, calls = read(answers, pieces, TOOLS, form.prompt)
            assert (content, calls) == (said, [])
    if name not in ("every message with a recipient", "a recipient in the header"):
        for pieces in cuts(f"{form.opening}Is it {call} now?{form.closing}{form.write([('rest', {})])}"):
            content, thoughts, calls = read(answers, pieces, TOOLS, form.prompt)
            assert (content, thoughts, calls) == ("", " ".join(f"Is it {call} now?".split()), [("rest", {})])


def test_reasoning_after_words_that_the_template_tells() -> None:
    told = (
        "{% if thinking %}Write your thoughts after 'My thoughts:' and write your answer after 'My answer:'.{% endif %}"
    )
    answers = answer_format(told + HEAD + TAIL)
    for pieces in cuts("My thoughts:\n\nHm.\n\nMy answer:\n\nYes."):
        assert read(answers, pieces, TWO_TOOLS, "<|assistant|>") == ("Yes.", "Hm.", [])


def test_the_prompt_opens_another_kind_of_reasoning() -> None:
    thought = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.c"
    answers = answer_format(HEAD.replace("{{ m.c", thought) + SHOWN["tags"][0] + TAIL)
    for tag in ("think", "think_fast"):
        for pieces in cuts(f'Hm.</{tag}>Yes.<do>{{"name": "rest", "arguments": {{}}}}</do>'):
            assert read(answers, pieces, TWO_TOOLS, f"<|assistant|><{tag}>\n") == ("Yes.", "Hm.", [("rest", {})])


@pytest.mark.parametrize("fence", ["", "```\n"])
def test_a_list_that_nothing_marks_may_be_written_otherwise(fence: str) -> None:
    shown = "{% if m.tool_calls %}" + fence + "[" + EACH
    shown += "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    shown += "{{ ', ' if not loop.last }}{% endfor %}]{{ '\n" + fence.strip() + "' }}{% endif %}"
    answers = answer_format(HEAD + shown + TAIL)
    assert answers.is_proved
    for text in (f"[{JSON}]", f"```\n[{JSON}]\n```", "[measure(place='Ilm', depth=4)]"):
        for pieces in cuts(text):
            assert read(answers, pieces, TWO_TOOLS, "<|assistant|>") == ("", "", CALLED)
    for text in ('[{"name": "Ada", "arguments": {}}]', "[f(x=1)]"):
        for pieces in cuts(text):
            assert read(answers, pieces, TWO_TOOLS, "<|assistant|>") == (text, "", [])


def test_white_space_between_tags_is_free() -> None:
    shown = EACH + "<do>{{ c.function.name }}<with>"
    shown += "{% for k, v in c.function.arguments.items() %}<k>{{ k }}</k><v>{{ v }}</v>{% endfor %}</do>{% endfor %}"
    answers = answer_format(HEAD + shown + TAIL)
    for text in (
        "<do>measure<with><k>place</k><v>Ilm</v><k>depth</k><v>4</v></do>",
        "<do>measure<with>\n<k>place</k>\n<v>Ilm</v>\n<k>depth</k>\n<v>4</v>\n</do>",
    ):
        for pieces in cuts(text):
            assert read(answers, pieces, TWO_TOOLS, "<|assistant|>") == ("", "", CALLED)


def test_what_stands_between_the_markers_of_a_call() -> None:
    answers = answer_format(HEAD + SHOWN["tags"][0] + TAIL)
    for text in (
        f"<do>{JSON}\n{JSON}</do>",
        f"<do>{JSON}, {JSON}",
        f"<do>\n```json\n{JSON}\n```\n</do><do>{JSON}</do>",
    ):
        for pieces in cuts(f"Now. {text}"):
            assert read(answers, pieces, TWO_TOOLS, "<|assistant|>") == ("Now.", "", CALLED * 2)
    for pieces in cuts(f'<do>{JSON}\n{{"place": "Ilm"'):
        assert read(answers, pieces, TWO_TOOLS, "<|assistant|>") == ('{"place": "Ilm"', "", CALLED)


def test_json_that_is_no_call_between_the_markers_of_one_stays_content() -> None:
    answers = answer_format(HEAD + SHOWN["tags"][0] + TAIL)
    for pieces in cuts(f'<do>{JSON}\n{{"a": 1}}</do>'):
        assert read(answers, pieces, TWO_TOOLS, "<|assistant|>") == ('{"a": 1}</do>', "", CALLED)


def test_keys_of_calls_that_nothing_marks() -> None:
    shown = "{{ {'tool': c.function.name, 'input': c.function.arguments} | tojson }}\n{% endfor %}"
    answers = answer_format(HEAD + EACH + shown + TAIL)
    assert answers.is_proved
    text = '{"tool": "measure", "input": {"place": "Ilm", "depth": 4}}'
    for pieces in cuts(f"Now. {text}\n{text}"):
        assert read(answers, pieces, TWO_TOOLS, "<|assistant|>") == ("Now.", "", CALLED * 2)
    for said in ('{"tool": "hammer", "input": {}}', '{"a": {"tool": "measure", "input": {}}}'):
        for pieces in cuts(said):
            assert read(answers, pieces, TWO_TOOLS, "<|assistant|>") == (said, "", [])


def test_python_calls_before_one_that_is_cut_off() -> None:
    form = FORMATS["Python in a section"]
    answers = answer_format(form.template)
    for rest in ("[/RUN]", "", "\nmeasure(place='Il", "\n[/R"):
        for pieces in cuts(f"[RUN]measure(place='Ilm', depth=4){rest}"):
            content, _, calls = read(answers, pieces, TWO_TOOLS, form.prompt)
            assert (content, calls) == ("" if rest == "[/RUN]" else rest.strip(), CALLED)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<function=measure>{"place": "Ilm", "depth": 4}</function>', CALLED),
        ('<function=other>\n{"x": "y"}\n</function>', [("other", {"x": "y"})]),
        (f"```json\n{JSON}\n{JSON}\n```", CALLED * 2),
        ('<tool_call>{"name": "measure", "arguments": {1: 2}}</tool_call>', [("measure", {"1": 2})]),
    ],
)
def test_calls_that_no_form_declares(text: str, calls: Calls) -> None:
    for pieces in cuts(f"Now. {text}"):
        assert read(answer_format(HEAD + TAIL), pieces, TWO_TOOLS, "<|assistant|>") == ("Now.", "", calls)


def test_a_marked_call_of_a_tool_that_is_not_there() -> None:
    text = (
        '<my:function_calls>\n<my:invoke name="other">\n<my:par name="x">y</my:par>\n</my:invoke>\n</my:function_calls>'
    )
    for pieces in cuts(text):
        assert read(answer_format(HEAD + TAIL), pieces, TWO_TOOLS, "<|assistant|>") == ("", "", [("other", {"x": "y"})])
    head = "{% for m in messages %}{% if m.content %}<|{{ m.role }}|>all<|body|>{{ m.content }}{% endif %}"
    shown = EACH + "<|assistant|>{{ c.function.name }}<|body|>{{ c.function.arguments | tojson }}{% endfor %}"
    answers = answer_format(head + shown + TAIL)
    assert answers.is_proved
    for said, wanted in (("all", ('{"x": "y"}', "", [])), ("other", ("", "", [("other", {"x": "y"})]))):
        for pieces in cuts(f'{said}<|body|>{{"x": "y"}}'):
            assert read(answers, pieces, TWO_TOOLS, "<|assistant|>") == wanted
