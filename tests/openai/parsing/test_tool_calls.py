"""Tool calls in every family's format, whole and one character at a time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.openai.parsing.parts import Call, Content, Part
from deployments.openai.parsing.reader import Reader
from deployments.openai.parsing.syntax import SYNTAXES

SCHEMAS = {
    "bash": {"properties": {"command": {"type": "string"}, "timeout": {"type": "integer"}, "flags": {"type": "array"}}},
    "finish": {"properties": {}},
}
NAMES = [name for name in SYNTAXES if name != "harmony"]
Calls = list[tuple[str, dict[str, Any]]]

LS: Calls = [("bash", {"command": "ls"})]
TWO: Calls = [("bash", {"command": "ls"}), ("finish", {})]
HALF: Calls = [("bash", {"command": "\ud800"})]
FLAGS: Calls = [("bash", {"flags": [True, None, {"a": False}]})]
FORMATS: list[tuple[str, str, str, Calls]] = [
    ("hermes", '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>', "", LS),
    (
        "hermes",
        'Let me look.\n\n<tool_call>{"name": "bash", "arguments": {"command": "ls"}}</tool_call>',
        "Let me look.",
        LS,
    ),
    (
        "hermes",
        '<tool_call>{"name": "bash", "arguments": {"command": "ls"}}</tool_call>\n'
        '<tool_call>{"name": "finish"}</tool_call>\n',
        "",
        TWO,
    ),
    ("hermes", '<tool_call>{"name": "bash", "arguments": "{\\"command\\": \\"ls\\"}"}</tool_call>', "", LS),
    ("hermes", '<tool_call>{"name": "bash", "arguments": {"command": "ls"}}', "", LS),
    (
        "hermes",
        '<tool_call>{"name": "bash", "arguments": {"command": "echo </tool_call>"}}</tool_call>',
        "",
        [("bash", {"command": "echo </tool_call>"})],
    ),
    (
        "hermes",
        "<tool_call>\n<function=bash>\n<parameter=command>\nls\n-l\n</parameter>\n<parameter=timeout>\n5\n</parameter>\n"
        "<parameter=flags>\n[1, true]\n</parameter>\n</function>\n</tool_call>",
        "",
        [("bash", {"command": "ls\n-l", "timeout": 5, "flags": [1, True]})],
    ),
    ("hermes", "<tool_call>\n<function=finish>\n</function>\n</tool_call>", "", [("finish", {})]),
    (
        "hermes",
        "<tool_call>bash\n<arg_key>command</arg_key>\n<arg_value>5</arg_value>\n<arg_key>timeout</arg_key>\n"
        "<arg_value>5</arg_value>\n</tool_call>",
        "",
        [("bash", {"command": "5", "timeout": 5})],
    ),
    ("llama3_json", '{"name": "bash", "parameters": {"command": "ls"}}', "", LS),
    (
        "llama3_json",
        '<|python_tag|>{"name": "bash", "parameters": {"command": "ls"}}; {"name": "finish", "parameters": {}}',
        "",
        TWO,
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "bash", "arguments": {"command": "ls"}}, {"name": "finish", "arguments": {}}]',
        "",
        TWO,
    ),
    ("mistral", 'I will.[TOOL_CALLS]bash[ARGS]{"command": "ls"}[TOOL_CALLS]finish[ARGS]{}', "I will.", TWO),
    ("mistral", '[TOOL_CALLS]bash[CALL_ID]abcdefghi[ARGS]{"command": "ls"}', "", LS),
    ("mistral", '[TOOL_CALLS]bash{"command": "ls"}', "", LS),
    (
        "deepseek",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>bash\n```json\n{"command": "ls"}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>finish\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        "",
        TWO,
    ),
    (
        "deepseek",
        'Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>bash<｜tool▁sep｜>{"command": "ls"}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        "Ok.",
        LS,
    ),
    (
        "kimi",
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.bash:0<|tool_call_argument_begin|>{"command": "ls"}'
        "<|tool_call_end|><|tool_call_begin|>functions.finish:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "",
        TWO,
    ),
    ("granite", '<|tool_call|>[{"name": "bash", "arguments": {"command": "ls"}}]', "", LS),
    ("phi4", 'functools[{"name": "bash", "arguments": {"command": "ls"}}]', "", LS),
    (
        "internlm",
        '<|action_start|><|plugin|>\n{"name": "bash", "parameters": {"command": "ls"}}<|action_end|>\n',
        "",
        LS,
    ),
    ("pythonic", '[bash(command="ls"), finish()]', "", TWO),
    ("pythonic", '<|python_start|>[bash(command="ls")]', "", LS),
    ("olmo3", '<function_calls>[bash(command="ls")]</function_calls>', "", LS),
    ("json", '```json\n{"name": "bash", "arguments": {"command": "ls"}}\n```', "", LS),
    (
        "llama3_json",
        'I will. {"name": "bash", "parameters": {"command": "ls"}} Then {"name": "finish", "parameters": {}}; done.',
        "I will.\nThen\n; done.",
        TWO,
    ),
    (
        "json",
        'Here {"a": 1}: [{"name": "bash", "arguments": {"command": "echo } ]"}}]',
        'Here {"a": 1}:',
        [("bash", {"command": "echo } ]"})],
    ),
    ("llama3_json", '{"name": "finish", "parameters": {}};<tool_call>', ";<tool_call>", [("finish", {})]),
    ("granite", 'So: {"name": "bash", "arguments": {"command": "ls"}}', "So:", LS),
    ("hermes", "<tool_call>finish\n</tool_call>", "", [("finish", {})]),
    ("hermes", '<tool_call>{"name": "finish", "arguments": null}</tool_call>', "", [("finish", {})]),
    ("hermes", '<tool_call>{"name": "finish", "arguments": " "}</tool_call>', "", [("finish", {})]),
    (
        "hermes",
        "<tool_call>\n<function=bash>\n<parameter=command>\nls\n<parameter=timeout>\n3\n</parameter>\n</function>\n"
        "</tool_call>",
        "",
        [("bash", {"command": "ls", "timeout": 3})],
    ),
    (
        "hermes",
        "<tool_call>\n<function=bash>\n<parameter=command>\nls\n</parameter>\n<parameter=timeout>\n3\n</function>\n"
        "</tool_call>",
        "",
        [("bash", {"command": "ls", "timeout": 3})],
    ),
    (
        "hermes",
        "<tool_call><function=bash><parameter=command>echo <parameter=x>\n<parameter=y></parameter></function>"
        "</tool_call>",
        "",
        [("bash", {"command": "echo <parameter=x>\n<parameter=y>"})],
    ),
    (
        "hermes",
        "<tool_call>bash\n<arg_key>command</arg_key>\n<arg_value>ls\n<arg_key>timeout</arg_key>\n<arg_value>5\n</tool_call>",
        "",
        [("bash", {"command": "ls", "timeout": 5})],
    ),
    ("olmo3", '<function_calls>\nbash(command="ls")\nfinish()\n</function_calls>', "", TWO),
    ("olmo3", "<function_calls>bash(flags=[true, null, {'a': false}])</function_calls>", "", FLAGS),
    ("pythonic", "[bash(flags=[True, None, {'a': False}])]", "", FLAGS),
    ("pythonic", '<|python_start|>[bash(command="ls"), finish()]<|python_end|>', "", TWO),
    (
        "hermes",
        '<tool_call>{"name": "bash", "arguments": {"timeout": NaN}}</tool_call>',
        "",
        [("bash", {"timeout": "NaN"})],
    ),
    ("hermes", '<tool_call>{"name": "bash", "arguments": {"command": "\\ud800"}}</tool_call>', "", HALF),
    ("mistral", '[TOOL_CALLS]bash[ARGS]{"timeout": -Infinity}', "", [("bash", {"timeout": "-Infinity"})]),
    ("pythonic", "[bash(timeout=1e999)]", "", [("bash", {"timeout": "Infinity"})]),
    ("json", '[{"name": "bash", "arguments": {"command": "ls"}}]', "", LS),
    ("json", '{"type": "function", "function": {"name": "bash", "arguments": {"command": "ls"}}}', "", LS),
]


def split(family: str, pieces: list[str]) -> list[Part]:
    splitter = Reader(SYNTAXES[family], SCHEMAS, reasons=False)
    parts = [part for piece in pieces for part in splitter.feed(piece)]
    return [*parts, *splitter.finish()]


def text_of(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


def calls_of(parts: list[Part]) -> Calls:
    return [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]


@pytest.mark.parametrize(("family", "text", "content", "calls"), FORMATS)
def test_formats(family: str, text: str, content: str, calls: Calls) -> None:
    for pieces in ([text], list(text), [text[:7], text[7:20], text[20:]]):
        parts = split(family, pieces)
        assert (text_of(parts), calls_of(parts)) == (content, calls)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello, world.\n",
        "  two spaces\n\nand lines  ",
        "1 < 2 and [x] and {y}",
        "<tool",
        "[TOOL",
        '{"answer": 42}',
        "[1, 2, 3]",
        "[f(1)]",
        "[x.y]",
        "``` no json",
        '<tool_call>\n{"name": "bash", "arguments": {"command": "l',
        "<tool_call>not json</tool_call> and more",
        "<tool_call>\n<function=bash>\n<parameter=command>\nls\n</parameter>\n",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>[1]</tool_call>",
        "[TOOL_CALLS] nothing",
        "[TOOL_CALLS]f[ARGS][1]",
        "<｜tool▁calls▁begin｜>x<｜tool▁calls▁end｜>",
        "<|tool_calls_section_begin|><|tool_call_begin|>f<|tool_call_end|><|tool_calls_section_end|>",
        '{"name": "Ada", "age": 36}',
        '{"name": "Ada"}',
        '{"name": "Ada", "arguments": {"age": 36}}',
        '[{"name": "finish", "parameters": {}}, {"name": "Ada", "parameters": {}}]',
        '{"name": "finish"}',
        '{"name": "finish", "arguments": "{"}',
        '{"name": "finish", "arguments": [1]}',
        '{"name": "finish", "arguments": {}',
        '{"type": "object", "name": "finish"}',
        '```json\n{"name": "Ada", "age": 36}\n```',
        "[print(x=1)]",
        '{"list": [{"name": "finish", "arguments": {}}]}',
        '<tool_call>{"name": "Ada", "age": 36}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        "<tool_call>nobody</tool_call>",
        "[" * 3000,
        "{" * 3000,
        "f(" * 3000,
    ],
)
def test_what_is_no_call_stays_content(family: str, text: str) -> None:
    for pieces in ([text], list(text)):
        parts = split(family, pieces)
        assert calls_of(parts) == []
        assert text_of(parts) == text


PIECES = st.sampled_from(
    [text for family, text, _, _ in FORMATS]
    + [
        '{"name": "Ada", "age": 36}',
        '{"answer": {"name": "x"}}',
        "[",
        "{",
        '"',
        " ",
        "\n",
        ";",
        "Hello.",
        "[x]",
        "</tool_call>",
        '{"name"',
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(NAMES)), st.lists(PIECES, max_size=4).map("".join), st.randoms(use_true_random=False))
def test_a_stream_and_a_whole_answer_agree(family: str, text: str, chance: Any) -> None:
    pieces, start = [], 0
    while start < len(text):
        size = chance.choice([1, 2, 3, 8, 40])
        pieces.append(text[start : start + size])
        start += size
    whole, stream = split(family, [text]), split(family, pieces)
    assert calls_of(stream) == calls_of(whole)
    assert text_of(stream) == text_of(whole)


def test_an_answer_in_json_is_given_out_as_it_comes() -> None:
    splitter = Reader(SYNTAXES["llama3_json"], SCHEMAS, reasons=False)
    assert splitter.feed('{"a') == []
    assert splitter.feed('nswer": [1, ') == [Content('{"answer": [1, ')]
    assert splitter.feed('{"name": "finish", ') == [Content('{"name": "finish", ')]
    assert splitter.feed('"arguments": {}}]} ') == [Content('"arguments": {}}]}')]


FINISH = '{"name": "finish", "arguments": {}}'
BASH = '{"name": "bash", "description": "Runs.", "parameters": {"type": "object", "properties": {"command": {}}}}'


@pytest.mark.parametrize("family", ["llama3_json", "granite", "json"])
@pytest.mark.parametrize(
    "text",
    [
        BASH,
        f'{{"type": "function", "function": {BASH}}}',
        f'[{{"type": "function", "function": {BASH}}}]',
        '{"name": "bash", "parameters": {"type": "object", "properties": {"command": {"type": "string"}}}}',
        '{"name": "bash", "arguments": {"command": "ls"}, "result": "a.txt"}',
        '[{"name": "finish", "arguments": {}, "took": 3}]',
        f"[[{FINISH}]]",
        f"[ [ {FINISH} ] ]",
        f"[[{FINISH}], 2]",
        f'{{"steps": [{FINISH}]}}',
        f'[1, 2] and [["{3}"]]',
        '[{"name": "Ada", "arguments": {}}, {"name": "finish", "arguments": {}}]',
    ],
)
def test_definitions_and_records_are_the_models_own(family: str, text: str) -> None:
    for pieces in ([text], list(text)):
        parts = split(family, pieces)
        assert (text_of(parts), calls_of(parts)) == (text, [])


def test_a_tool_may_have_arguments_named_as_a_schema_is() -> None:
    schemas = {"check": {"properties": {"type": {"type": "string"}, "properties": {"type": "object"}}}}
    splitter = Reader(SYNTAXES["llama3_json"], schemas, reasons=False)
    text = '{"name": "check", "parameters": {"type": "object", "properties": {}}}'
    assert calls_of([*splitter.feed(text), *splitter.finish()]) == [("check", {"type": "object", "properties": {}})]


def test_keywords_without_a_name_are_no_arguments() -> None:
    text = '[finish(**{"a": 1})]'
    assert split("pythonic", [text]) == [Content(text)]


def test_a_broken_call_does_not_hide_the_next() -> None:
    text = 'a<tool_call>{"name": </tool_call>b\n<tool_call>{"name": "finish"}</tool_call>'
    for pieces in ([text], list(text)):
        parts = split("hermes", pieces)
        assert calls_of(parts) == [("finish", {})]
        assert text_of(parts) == 'a<tool_call>{"name": </tool_call>b'


def test_content_is_given_out_at_once() -> None:
    splitter = Reader(SYNTAXES["hermes"], SCHEMAS, reasons=False)
    assert splitter.feed("Hello wor") == [Content("Hello wor")]
    assert splitter.feed("ld <") == [Content("ld")]
    assert splitter.feed("b>") == [Content(" <b>")]


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "f"}', "<", "x", " ", "\n", "tool_call>", "{"]))
)
def test_nothing_is_lost(pieces: list[str]) -> None:
    parts = split("hermes", pieces)
    calls = calls_of(parts)
    spoken = text_of(parts)
    for _ in calls:
        spoken += '<tool_call>{"name": "f"}</tool_call>'
    assert sorted("".join(spoken.split())) == sorted("".join("".join(pieces).split())) or calls
    assert text_of(split("hermes", list("".join(pieces)))) == text_of(parts)
