"""Constraints on the answers of models that reason: the reasoning is free, the content follows the constraint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from openai import OpenAI

from tests.forms import covering
from tests.openai.conftest import Serve
from tests.openai.saying import say

LOADER = "tests.openai.saying:load_model"
ENGINES = ("continuous_batching", "generate")
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "save", "parameters": SCHEMA}}
THOUGHT = 'I {think} "so"'


def is_answer(text: str) -> bool:
    return isinstance(json.loads(text)["answer"], int)


CONSTRAINTS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        is_answer,
    ),
    "json_object": ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: text in ("yes", "no")),
    "regex": ({"structured_outputs": {"regex": "[a-c]{3}"}}, lambda text: re.fullmatch("[a-c]{3}", text) is not None),
    "lark": ({"structured_outputs": {"grammar": 'start: "1" | "2"'}}, lambda text: text in ("1", "2")),
    "guided_json": ({"guided_json": SCHEMA}, is_answer),
}
# How the reasoning begins: by the prompt, by the model itself, not at all.
OPENED = {"prompt": ({"think": True}, f"{THOUGHT}</think>\n\n"), "model": ({}, f"<think>{THOUGHT}</think>")}


@pytest.fixture(scope="module")
def client(serve: Serve) -> OpenAI:
    def model(name: str, engine: str, **kwargs: Any) -> dict[str, Any]:
        options = {"kind": engine, "pack_linears": False, "threads": 1}
        api = {"reasoning_parser": "think"}
        return {"id": name, "loader": LOADER, "kwargs": kwargs, "engine": options, "api": api}

    models = [model(engine, engine) for engine in ENGINES]
    models += [
        model("special", "continuous_batching", special=["<think>", "</think>"]),
        model("merged", "continuous_batching", plain=[">\n\n{", ">x"]),
        model("spaced", "continuous_batching", special=["<think> ", "</think>\n\n"]),
    ]
    harmony = {
        **model("harmony", "continuous_batching"),
        "api": {"reasoning_parser": "harmony", "tool_parser": "harmony"},
    }
    described = {**model("described", "continuous_batching"), "api": {}, "loader": "tests.openai.saying:described"}
    return serve([*models, harmony, described]).client(timeout=60, _strict_response_validation=False)


def ask(client: OpenAI, model: str, text: str, template: dict[str, Any], **fields: Any) -> Any:
    extra = {"chat_template_kwargs": template, **fields.pop("extra_body", {})}
    fields = {"temperature": 0, "max_tokens": 200, "extra_body": extra, **fields}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": say(text)}], **fields)


def streamed(chunks: Any) -> tuple[str, str, list[str]]:
    """Reasoning, content and finish reasons."""
    reasoning, content, reasons = "", "", []
    for chunk in chunks:
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    return reasoning, content, reasons


@covering(("name", CONSTRAINTS), ("opened", OPENED), ("engine", ENGINES))
def test_the_content_follows_the_constraint(client: OpenAI, name: str, opened: str, engine: str) -> None:
    constraint, fits = CONSTRAINTS[name]
    template, thought = OPENED[opened]
    text = f"{thought}The answer is 4."
    answer = ask(client, engine, text, template, extra_body=constraint, n=2)
    for choice in answer.choices:
        assert choice.message.reasoning_content == THOUGHT
        assert fits(choice.message.content)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2 * len(thought.rstrip("\n"))
    reasoning, content, _ = streamed(ask(client, engine, text, template, extra_body=constraint, stream=True))
    assert (reasoning, content) == (THOUGHT, answer.choices[0].message.content)
    hidden = ask(client, engine, text, template, extra_body={**constraint, "include_reasoning": False})
    assert hidden.choices[0].message.content == content
    assert not hasattr(hidden.choices[0].message, "reasoning_content")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_that_follows_is_the_models_own(client: OpenAI, engine: str) -> None:
    constraint, _ = CONSTRAINTS["json_schema"]
    for template, thought in OPENED.values():
        choice = ask(client, engine, f'{thought}{{"answer": 42}}', template, extra_body=constraint).choices[0]
        assert (choice.message.content, choice.finish_reason) == ('{"answer": 42}', "stop")


@pytest.mark.parametrize("model", [*ENGINES, "special", "merged"])
def test_without_reasoning_the_constraint_begins_at_once(client: OpenAI, model: str) -> None:
    constraint, _ = CONSTRAINTS["json_schema"]
    for template in ({}, {"think": False}):
        choice = ask(client, model, '{"answer": 7}', template, extra_body=constraint).choices[0]
        assert choice.message.content == '{"answer": 7}'
        assert not hasattr(choice.message, "reasoning_content")
    # The template has closed the reasoning: the model cannot open it again.
    choice = ask(client, model, "<think>no</think>", {"think": False}, extra_body=constraint).choices[0]
    assert is_answer(choice.message.content)
    prefilled: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": '{"ans' + say('wer": 5}')[3:]}]
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    done = client.chat.completions.create(
        model=model,
        messages=prefilled,
        temperature=0,
        max_tokens=50,
        extra_body={**going_on, "guided_regex": 'wer": [0-9]}'},
    )
    assert done.choices[0].message.content == 'wer": 5}'


@pytest.mark.parametrize("model", ["special", "merged"])
def test_markers_of_any_kind_of_token(client: OpenAI, model: str) -> None:
    constraint, _ = CONSTRAINTS["json_schema"]
    for end in ("</think>\n\n", "</think>"):
        for answer in ('{"answer": 1}', "x is 1"):
            choice = ask(client, model, f"hm{end}{answer}", {"think": True}, extra_body=constraint).choices[0]
            assert choice.message.reasoning_content == "hm"
            assert is_answer(choice.message.content)


@covering(("name", ["json_schema", "choice", "lark"]), ("model", [*ENGINES, "special", "merged", "spaced"]), meet=1)
def test_a_turn_that_ends_within_the_reasoning_has_an_answer(client: OpenAI, name: str, model: str) -> None:
    constraint, fits = CONSTRAINTS[name]
    for template, thought in (({"think": True}, THOUGHT), ({}, f"<think> {THOUGHT}")):
        choice = ask(client, model, thought, template, extra_body=constraint).choices[0]
        assert choice.message.reasoning_content.strip() == THOUGHT
        assert fits(choice.message.content)
        reasoning, content, reasons = streamed(
            ask(client, model, thought, template, extra_body=constraint, stream=True)
        )
        assert (reasoning.strip(), content, reasons) == (THOUGHT, choice.message.content, [choice.finish_reason])


def test_markers_with_the_white_space_around_them(client: OpenAI) -> None:
    message = ask(client, "spaced", f"<think> {THOUGHT}</think>\n\nfour", {}).choices[0].message
    assert (message.reasoning_content.strip(), message.content) == (THOUGHT, "four")
    constraint, fits = CONSTRAINTS["json_schema"]
    message = (
        ask(client, "spaced", f"{THOUGHT}</think>\n\nfour", {"think": True}, extra_body=constraint).choices[0].message
    )
    assert message.reasoning_content == THOUGHT
    assert fits(message.content)


@covering(
    (
        "fields",
        [c for c, _ in CONSTRAINTS.values()]
        + [{"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}],
    ),
    ("engine", ENGINES),
    meet=1,
)
def test_a_budget_that_ends_within_the_reasoning(client: OpenAI, engine: str, fields: dict[str, Any]) -> None:
    for template, thought in OPENED.values():
        choice = ask(client, engine, f"{thought}4", template, extra_body=fields, max_tokens=12).choices[0]
        assert (choice.message.content, choice.finish_reason) == (None, "length")
        assert THOUGHT.startswith(choice.message.reasoning_content)
        chunks = ask(client, engine, f"{thought}4", template, extra_body=fields, max_tokens=12, stream=True)
        assert streamed(chunks) == (choice.message.reasoning_content, "", ["length"])


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_strings_count_in_the_answer_only(client: OpenAI, engine: str) -> None:
    text = f'{THOUGHT}</think>{{"answer": 42}}'
    choice = ask(client, engine, text, {"think": True}, extra_body=CONSTRAINTS["json_schema"][0], stop="so").choices[0]
    assert (choice.message.content, choice.finish_reason) == ('{"answer": 42}', "stop")


@pytest.mark.parametrize("model", [*ENGINES, "special", "spaced"])
def test_newlines_between_reasoning_and_answer_are_no_stop_strings(client: OpenAI, model: str) -> None:
    constraint, _ = CONSTRAINTS["json_schema"]
    for stop in ("\n", "\n\n"):
        text = f'{THOUGHT}</think>\n\n{{"answer": 42}}'
        choice = ask(client, model, text, {"think": True}, extra_body=constraint, stop=stop).choices[0]
        assert (choice.message.reasoning_content, choice.message.content) == (THOUGHT, '{"answer": 42}')
        given = streamed(
            ask(client, model, f"{THOUGHT}</think>\n\nfour\n\nfive", {"think": True}, stop=stop, stream=True)
        )
        assert given == (THOUGHT, "four", ["stop"])


@covering(("engine", ENGINES), ("choice", ["required", {"type": "function", "function": {"name": "save"}}]), meet=1)
def test_forced_tools(client: OpenAI, engine: str, choice: Any) -> None:
    for template, thought in OPENED.values():
        fields: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 300}
        fields["parallel_tool_calls"] = False  # The model may write calls for ever.
        message = ask(client, engine, f"{thought}I will.", template, **fields).choices[0].message
        assert (message.reasoning_content, message.content) == (THOUGHT, None)
        assert [is_answer(call.function.arguments) for call in message.tool_calls] == [True] * len(message.tool_calls)
        chunks = list(ask(client, engine, f"{thought}I will.", template, **fields, stream=True))
        assert streamed(chunks)[:2] == (THOUGHT, "")
        assert [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]


@covering(
    ("engine", ENGINES),
    ("choice", ["required", {"type": "function", "function": {"name": "save"}}]),
    ("template", [{}, {"think": False}]),
    meet=2,
)
def test_a_forced_call_that_is_cut_off_is_no_content(
    client: OpenAI, engine: str, choice: Any, template: dict[str, Any]
) -> None:
    for budget in (1, 3):
        fields: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": budget}
        (cut,) = ask(client, engine, '[{"name": "save"', template, **fields).choices
        assert (cut.message.content, cut.message.tool_calls, cut.finish_reason) == ("", None, "length")
        assert streamed(ask(client, engine, "[", template, **fields, stream=True)) == ("", "", ["length"])


@pytest.mark.parametrize("engine", ENGINES)
def test_responses(client: OpenAI, engine: str) -> None:
    wanted: Any = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    fields: dict[str, Any] = {"input": say(f"<think>{THOUGHT}</think>Well."), "text": wanted, "temperature": 0}
    done = client.responses.create(model=engine, **fields)
    assert is_answer(done.output_text)
    assert done.output[0].content[0].text == THOUGHT  # type: ignore[union-attr]
    events = list(client.responses.create(model=engine, **fields, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == done.output_text


def test_channels_and_described_answers(client: OpenAI) -> None:
    header = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"
    cases: dict[str, Any] = {"harmony": (header, {}), "described": ("hm</think>", {"think": True})}
    tools: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    for model, (thought, template) in cases.items():
        # A described tokenizer is asked where tools are offered, or where a parser names it.
        message = ask(client, model, f"{thought}Well.", template, **tools).choices[0].message
        assert (message.reasoning_content, message.content) == ("hm", None)
        assert [is_answer(call.function.arguments) for call in message.tool_calls] == [True] * len(message.tool_calls)
    schema, _ = CONSTRAINTS["json_schema"]
    message = ask(client, "harmony", f"{header}Well.", {}, extra_body=schema).choices[0].message
    assert (message.reasoning_content, is_answer(message.content)) == ("hm", True)


@pytest.mark.parametrize(
    "other",
    [
        "<|channel|>commentary<|message|>I look.",
        '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"q": 1}',
        "<|channel|>analysis<|message|>hm",
    ],
)
@pytest.mark.parametrize("final", ["", "<|end|><|start|>assistant<|channel|>final<|message|>Well."])
def test_of_channels_the_final_one_alone_is_the_constrained_answer(client: OpenAI, other: str, final: str) -> None:
    schema, _ = CONSTRAINTS["json_schema"]
    message = ask(client, "harmony", f"{other}{final}", {}, extra_body=schema).choices[0].message
    assert (is_answer(message.content), message.tool_calls) == (True, None)
    tools: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    message = ask(client, "harmony", f"{other}{final}", {}, **tools).choices[0].message
    assert message.content is None
    assert {call.function.name for call in message.tool_calls} == {"save"}


def test_without_tools_a_message_to_a_function_is_content(client: OpenAI) -> None:
    text = '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"q": 1}'
    message = ask(client, "harmony", text, {}).choices[0].message
    assert (message.content, message.tool_calls) == ('{"q": 1}', None)
