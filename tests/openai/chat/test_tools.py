"""Tools and reasoning through the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from deployments.core.errors import ConfigError
from deployments.local import make_app
from tests.openai import scripted
from tests.openai.conftest import SCRIPTED, Serve, Server

BASH = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
FINISH = {"type": "function", "function": {"name": "finish"}}
LS = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
DONE = '<tool_call>\n{"name": "finish", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def thinker(serve: Serve) -> Server:
    def model(name: str, **api: Any) -> dict[str, Any]:
        return {"id": name, "loader": SCRIPTED, "api": api}

    return serve([model("thinks", reasoning_parser="think"), model("mistral", tool_parser="mistral")])


def ask(client: OpenAI, content: str, model: str = "org/scripted", **fields: Any) -> Any:
    fields = {"tools": [BASH, FINISH], **fields}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], **fields)


def streamed(client: OpenAI, content: str, **fields: Any) -> tuple[str, list[dict[str, str]], list[str]]:
    """Content, calls and finish reasons, put together as agents do."""
    text, calls, reasons = "", {}, []
    for chunk in ask(client, content, stream=True, **fields):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for delta in choice.delta.tool_calls or []:
            call = calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
            call["id"] += delta.id or ""
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
    return text, [calls[index] for index in sorted(calls)], reasons


def test_a_call(client: OpenAI) -> None:
    choice = ask(client, LS).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert (call.type, call.function.name) == ("function", "bash")
    assert json.loads(call.function.arguments) == {"command": "ls"}


def test_several_calls(client: OpenAI) -> None:
    message = ask(client, f"First.\n{LS}\n{DONE}").choices[0].message
    assert message.content == "First."
    assert [call.function.name for call in message.tool_calls] == ["bash", "finish"]
    assert len({call.id for call in message.tool_calls}) == 2
    text, calls, reasons = streamed(client, f"First.\n{LS}\n{DONE}")
    assert text == "First."
    assert [(call["name"], call["arguments"]) for call in calls] == [("bash", '{"command": "ls"}'), ("finish", "{}")]
    assert all(call["id"] for call in calls)
    assert reasons == ["tool_calls"]


def test_one_call_at_a_time(client: OpenAI) -> None:
    message = ask(client, f"{LS}\n{DONE}", parallel_tool_calls=False).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["bash"]
    assert len(streamed(client, f"{LS}\n{DONE}", parallel_tool_calls=False)[1]) == 1


def test_no_call(client: OpenAI) -> None:
    choice = ask(client, "Nothing to do.").choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Nothing to do.", "stop")
    assert choice.message.tool_calls is None
    assert streamed(client, "Nothing to do.") == ("Nothing to do.", [], ["stop"])


def test_a_call_cut_off_stays_content(client: OpenAI) -> None:
    choice = ask(client, LS, max_tokens=30).choices[0]
    assert (choice.message.content, choice.finish_reason) == (LS[:30], "length")
    assert streamed(client, LS, max_tokens=30) == (LS[:30], [], ["length"])


def test_without_tools_the_text_is_left_alone(client: OpenAI) -> None:
    for fields in ({"tools": openai.NOT_GIVEN}, {"tool_choice": "none"}):
        assert ask(client, LS, **fields).choices[0].message.content == LS


def prompt_of(client: OpenAI, **fields: Any) -> str:
    text: str = ask(client, "x", extra_body={"return_prompt_text": True}, **fields).prompt_text
    return text


def test_the_template_gets_the_tools(client: OpenAI) -> None:
    assert "'name': 'bash'" in prompt_of(client)
    assert "<tools>" not in prompt_of(client, tool_choice="none")


def test_the_turns_of_an_agent(client: OpenAI) -> None:
    first = ask(client, LS).choices[0].message
    messages: Any = [
        {"role": "user", "content": LS},
        first,
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "a file", "name": "bash"},
    ]
    fields: Any = {"tools": [BASH], "extra_body": {"return_prompt_text": True}}
    answer = client.chat.completions.create(model="org/scripted", messages=messages, **fields)
    assert "'arguments': {'command': 'ls'}" in answer.prompt_text
    assert "<tool>a file</tool>" in answer.prompt_text
    assert answer.choices[0].message.content == "a file"


def grammar(client: OpenAI, content: str, choice: Any, **fields: Any) -> tuple[Any, Any]:
    answer = ask(client, content, tool_choice=choice, **fields)
    (engine,) = [each for each in scripted.ENGINES if each.seen and each.seen[-1].request_id.startswith(answer.id)]
    found = engine.seen[-1].sampling.grammar
    return answer.choices[0], None if found is None else json.loads(found.source)


NAMED = {"type": "function", "function": {"name": "bash"}}


def test_a_named_tool_is_enforced(client: OpenAI) -> None:
    choice, schema = grammar(client, '{"command": "ls"}', NAMED)
    assert schema == {"$ref": "#/$defs/bash", "$defs": {"bash": BASH["function"]["parameters"]}}  # type: ignore[index]
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("bash", {"command": "ls"})
    assert choice.message.content is None


def test_a_required_call_is_enforced(client: OpenAI) -> None:
    text = '[{"name": "bash", "arguments": {"command": "ls"}}, {"name": "finish", "arguments": {}}]'
    choice, schema = grammar(client, text, "required")
    assert [call.function.name for call in choice.message.tool_calls] == ["bash", "finish"]
    assert choice.finish_reason == "tool_calls"
    assert schema["minItems"] == 1
    assert "maxItems" not in schema
    _, schema = grammar(client, "[]", "required", parallel_tool_calls=False)
    assert schema["maxItems"] == 1
    text, calls, reasons = streamed(client, text, tool_choice="required")
    assert (text, len(calls), reasons) == ("", 2, ["tool_calls"])


def test_allowed_tools(client: OpenAI) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    _, schema = grammar(client, "[]", allowed)
    assert list(schema["$defs"]) == ["bash"]
    allowed["allowed_tools"]["mode"] = "auto"  # type: ignore[index]
    assert grammar(client, "x", allowed)[1] is None


def test_a_forced_call_cut_off_is_no_content(client: OpenAI) -> None:
    choice, _ = grammar(client, '{"command": "ls"}', NAMED, max_tokens=5)
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("", None, "length")


def test_of_forced_calls_cut_off_the_complete_ones_are_left(client: OpenAI) -> None:
    text = '[{"name": "bash", "arguments": {"command": "]},"}} , {"name": "finish", "argu'
    choice, _ = grammar(client, text + "ments", "required", max_tokens=len(text))
    assert [call.function.name for call in choice.message.tool_calls] == ["bash"]
    assert choice.finish_reason == "length"


def test_references_in_schemas_stay_right(client: OpenAI) -> None:
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "f/g", "parameters": parameters}}
    _, schema = grammar(client, "{}", {"type": "function", "function": {"name": "f/g"}}, tools=[tool])
    assert schema["$defs"]["f/g"]["properties"]["a"] == {"$ref": "#/$defs/f~1g/$defs/A"}


def test_of_schemas_references_alone_change(client: OpenAI) -> None:
    data = {"$ref": "#/x", "$schema": "s", "$id": "i"}
    properties = {
        "$schema": {"const": data},
        "$id": {"enum": [data], "default": data, "examples": [data]},
        "default": {"$ref": "#"},
        "enum": {"$ref": "#named"},
    }
    parameters = {"$id": "https://a.b/c", "$schema": "s", "type": "object", "properties": properties}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    _, schema = grammar(client, "{}", {"type": "function", "function": {"name": "f"}}, tools=[tool])
    changed = {**properties, "default": {"$ref": "#/$defs/f"}}
    assert schema["$defs"]["f"] == {"type": "object", "properties": changed}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_mistakes(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "x", **fields)
    assert error.value.param == param


def test_the_longest_name_is_said(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="with a name of 1 to 256 characters"):
        ask(client, "x", tools=[{"type": "function", "function": {"name": "f" * 257}}])


def test_reasoning(thinker: Server) -> None:
    client = thinker.client()
    text = f"<think>\nhm\n</think>\n\nHere: {LS}"
    message = ask(client, text, model="thinks").choices[0].message
    assert (message.reasoning_content, message.content) == ("hm", "Here:")
    assert message.tool_calls[0].function.name == "bash"
    reasoning = content = ""
    for chunk in ask(client, text, model="thinks", stream=True):
        reasoning += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        content += chunk.choices[0].delta.content or ""
    assert (reasoning, content) == ("hm", "Here:")
    hidden = ask(client, text, model="thinks", extra_body={"include_reasoning": False}).choices[0].message
    assert not hasattr(hidden, "reasoning_content")
    assert not hasattr(ask(client, "no thought", model="thinks").choices[0].message, "reasoning_content")


def test_reasoning_that_the_prompt_opened(thinker: Server) -> None:
    client = thinker.client()
    messages: Any = [{"role": "user", "content": "hm</think>yes"}, {"role": "assistant", "content": "<think>\n"}]
    fields: Any = {"continue_final_message": True}
    message = client.chat.completions.create(model="thinks", messages=messages, extra_body=fields).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm", "yes")


def test_a_budget_spent_on_reasoning(thinker: Server) -> None:
    choice = ask(thinker.client(), "<think>on and on", model="thinks", max_tokens=12).choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == ("on an", None)
    assert choice.finish_reason == "length"


def test_a_family_whose_markers_are_special(thinker: Server) -> None:
    message = ask(thinker.client(), '[TOOL_CALLS]bash[ARGS]{"command": "ls"}', model="mistral").choices[0].message
    (call,) = message.tool_calls
    assert len(call.id) == 9
    (engine,) = [
        each for each in scripted.ENGINES if each.seen and "[TOOL_CALLS]bash" in (each.seen[-1].prompt_text or "")
    ]
    assert {"[TOOL_CALLS]", "[ARGS]"} <= set(engine.seen[-1].sampling.markers)


def test_harmony(serve: Serve) -> None:
    """gpt-oss: thoughts, calls and the answer are channels."""
    served = serve([{"id": "org/scripted", "loader": SCRIPTED, "api": {"reasoning_parser": "harmony"}}]).client()
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    message = ask(served, f"{thought}<|channel|>final<|message|>yes", tools=None).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm", "yes")
    called = f'{thought}<|channel|>commentary to=functions.bash <|constrain|>json<|message|>{{"command": "ls"}}'
    choice = ask(served, called).choices[0]
    assert (choice.message.reasoning_content, choice.finish_reason) == ("hm", "tool_calls")
    assert choice.message.tool_calls[0].function.arguments == '{"command": "ls"}'
    assert streamed(served, called)[1][0]["name"] == "bash"


@pytest.mark.parametrize("loader", ["with_response_template", "describes_answers"])
def test_a_description_of_the_answers_is_followed(serve: Serve, loader: str) -> None:
    described = serve([{"id": "org/scripted", "loader": f"tests.openai.scripted:{loader}"}]).client()
    choice = ask(described, 'So.<call>{"name": "bash", "arguments": {"command": "ls"}}</call>').choices[0]
    assert (choice.message.content, choice.finish_reason) == ("So.", "tool_calls")
    assert choice.message.tool_calls[0].function.name == "bash"
    text, calls, _ = streamed(described, 'So.<call>{"name": "finish", "arguments": {}}</call>')
    assert (text, calls[0]["name"], calls[0]["arguments"]) == ("So.", "finish", "{}")
    assert streamed(described, "So.<call>{broken</call>") == ("So.<call>{broken</call>", [], ["stop"])


@pytest.mark.parametrize("api", [{"tool_parser": "hermse"}, {"reasoning_parser": "thinks"}])
def test_unknown_parsers_are_refused_at_start(api: dict[str, str]) -> None:
    model = {"id": "m", "loader": SCRIPTED, "api": api}
    with pytest.raises(ConfigError, match="known: "):
        make_app({"models": [model]})


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "none"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=a)"}}}, "expression"),
        ({"properties": {"a": {"type": "x"}}}, "type"),
    ],
)
@pytest.mark.parametrize("choice", ["auto", None])
def test_a_strict_schema_that_no_grammar_holds_is_refused(
    client: OpenAI, schema: dict[str, Any], named: str, choice: str | None
) -> None:
    function = {"name": "f", "parameters": schema, "strict": True}
    fields: dict[str, Any] = {"tools": [BASH, {"type": "function", "function": function}], "tool_choice": choice}
    with pytest.raises(openai.BadRequestError, match=named) as error:
        ask(client, "x", **fields)
    assert error.value.param == "tools[1].function.parameters"
    for loose in (
        {**fields, "tool_choice": "none"},
        {"tools": [{"type": "function", "function": {**function, "strict": False}}]},
    ):
        assert ask(client, "x", **loose).choices[0].message.content == "x"


def test_an_answer_in_json_is_not_made_a_call(serve: Serve) -> None:
    model = {"id": "org/scripted", "loader": SCRIPTED, "api": {"tool_parser": "llama3_json"}}
    with serve([model]).client() as served:
        for text in ('{"name": "Ada", "age": 36}', '{"name": "Ada", "arguments": {"age": 36}}', '{"name": "bash"}'):
            choice = ask(served, text).choices[0]
            assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
            assert streamed(served, text) == (text, [], ["stop"])
        called = '{"name": "bash", "parameters": {"command": "ls"}}'
        assert ask(served, f"So: {called}").choices[0].message.tool_calls[0].function.name == "bash"
