"""Markers of calls and reasoning that a tokenizer has as special tokens are read; other special tokens stay out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from tests.openai.conftest import Serve
from tests.openai.saying import say

LOADER = "tests.openai.saying:load_model"
TOOL: Any = {
    "type": "function",
    "function": {"name": "get", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
# How families write one call, by the names of their parsers; what stands in brackets or bars is a special token.
CALLS = {
    "hermes": '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>',
    "glm": "<tool_call>get\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "coder": "<tool_call>\n<function=get>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "llama3_json": '<|python_tag|>{"name": "get", "parameters": {"a": 1}}',
    "mistral": '[TOOL_CALLS]get[ARGS]{"a": 1}',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>"
    '{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get:0<|tool_call_argument_begin|>"
    '{"a": 1}<|tool_call_end|><|tool_calls_section_end|>',
    "granite": '<|tool_call|>[{"name": "get", "arguments": {"a": 1}}]',
    "granite4": '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>',
    "internlm": '<|action_start|><|plugin|>{"name": "get", "parameters": {"a": 1}}<|action_end|>',
    "pythonic": "<|python_start|>[get(a=1)]<|python_end|>",
    "olmo3": "<function_calls>[get(a=1)]</function_calls>",
    "harmony": '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"a": 1}',
}
FORMATS = {"glm": "hermes", "coder": "hermes", "granite4": "granite"}
TOKENS = [
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</function>"),
    *("<parameter=", "</parameter>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<｜tool▁calls▁begin｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|tool_call|>"),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    *("<|tool_calls_section_end|>", "<|action_start|>", "<|plugin|>", "<|action_end|>", "<|python_start|>"),
    *("<|python_end|>", "<function_calls>", "</function_calls>", "<|channel|>", "<|message|>", "<|constrain|>"),
    *("<think>", "</think>", "[THINK]", "[/THINK]", "<|other|>"),
]


@pytest.fixture(scope="module")
def client(serve: Serve) -> OpenAI:
    def model(name: str, kind: str = "bytes", **api: Any) -> dict[str, Any]:
        kwargs = {"kind": kind, "special": TOKENS}
        return {"id": name, "loader": LOADER, "kwargs": kwargs, "api": api, "engine": {"pack_linears": False}}

    models = [model(family, tool_parser=family) for family in sorted({FORMATS.get(name, name) for name in CALLS})]
    models += [model("pieces", "sentencepiece", tool_parser="hermes", reasoning_parser="think")]
    models += [model("think", reasoning_parser="think"), model("think-mistral", reasoning_parser="mistral")]
    return serve(models).client(timeout=60, _strict_response_validation=False)


def ask(client: OpenAI, model: str, text: str, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 200, **fields}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": say(text)}], **fields)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_between_special_tokens_is_read(client: OpenAI, name: str) -> None:
    model = FORMATS.get(name, name)
    choice = ask(client, model, CALLS[name], tools=[TOOL]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get", {"a": 1})
    chunks = list(ask(client, model, CALLS[name], tools=[TOOL], stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert [json.loads(delta.function.arguments) for delta in deltas] == [{"a": 1}]


@pytest.mark.parametrize("name", ["hermes", "mistral", "deepseek", "kimi", "granite"])
def test_special_tokens_that_nothing_reads_stay_out(client: OpenAI, name: str) -> None:
    text = "So.<|other|> It is<|action_start|> 4."
    assert ask(client, name, text, tools=[TOOL]).choices[0].message.content == "So. It is 4."
    shown = ask(client, name, text, tools=[TOOL], extra_body={"skip_special_tokens": False})
    assert shown.choices[0].message.content == text
    # Without tools no call is looked for, so its markers are left out as ever.
    assert ask(client, name, "a<tool_call>b").choices[0].message.content == "ab"


def test_reasoning_between_special_tokens_is_read(client: OpenAI) -> None:
    for model, text in (("think", "<think>hm<|other|></think>\n\nyes"), ("think-mistral", "[THINK]hm[/THINK]yes")):
        answer = ask(client, model, text)
        message = answer.choices[0].message
        assert (message.reasoning_content, message.content) == ("hm", "yes")
        assert answer.usage.completion_tokens_details.reasoning_tokens > 0
        chunks = [chunk.choices[0].delta for chunk in ask(client, model, text, stream=True)]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in chunks) == "hm"
        assert "".join(delta.content or "" for delta in chunks) == "yes"


def test_pieces_keep_their_spaces_around_special_markers(client: OpenAI) -> None:
    text = '<think>Paris is</think> the<tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>'
    choice = ask(client, "pieces", text, tools=[TOOL]).choices[0]
    assert choice.message.reasoning_content.strip() == "Paris is"
    assert choice.message.content.strip() == "the"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": 1}


def test_stop_strings_and_logprobs_are_as_they_were(client: OpenAI) -> None:
    text = "ab<|other|>c"
    assert ask(client, "hermes", text, tools=[TOOL], stop="bc").choices[0].message.content == "a"
    stopped = ask(client, "hermes", text, tools=[TOOL], stop="<|other|>").choices[0]
    assert (stopped.message.content, stopped.model_extra["stop_reason"]) == ("ab", "<|other|>")
    entries = ask(client, "hermes", text, tools=[TOOL], logprobs=True).choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["a", "b", "<|other|>", "c", "<|im_end|>"]
