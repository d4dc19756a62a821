"""The keys of messages, tools and the choice among them, and defaults that a request does not go with."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests

from deployments.config.api import ApiOptions
from deployments.openai.default_params import default_faults
from tests.openai.asking import CHAT, COMPLETIONS, post, refusal, sampled
from tests.openai.conftest import Serve, Server

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"name": "get", "parameters": SCHEMA}
USER = {"role": "user", "content": "abcdef"}


MISSPELT: list[tuple[dict[str, Any], str]] = [
    ({**SCHEMA, "requried": ["a"]}, "'requried'; did you mean 'required'"),
    ({"Type": "object"}, "'Type'; did you mean 'type'"),
    ({"properties": {"minimun": {"type": "integer", "minimun": 3}}}, "'properties.minimun.minimun'"),
    ({"type": "array", "items": {"anyOf": [{}, {"max_length": 3}]}}, "'items.anyOf[1].max_length'"),
    ({"$defs": {"a": {"patern": "^a$"}}, "$ref": "#/$defs/a"}, "'$defs.a.patern'"),
    ({"additionalProperties": {"enums": [1]}}, "'additionalProperties.enums'"),
    ({"properties": {"a": {"type": ["strng", "null"]}}}, "type 'strng' at 'properties.a.type'; did you mean 'string'?"),
    (
        {"properties": {"a": {"pattern": "(?=a)b"}}},
        "'(?=a)b' at 'properties.a.pattern' cannot be followed: look-around",
    ),
    ({"items": {"pattern": "a(b"}}, "'a(b' at 'items.pattern' cannot be followed: unclosed group."),
    ({"type": "object", "additonal_properties": False}, "'additonal_properties'"),
]
OWN = {
    "type": "object",
    "propertyOrdering": ["a"],
    "note": "x",
    "x-order": 1,
    "default": {"requried": 1},
    "examples": [{"tpye": 1}],
    "properties": {"requried": {"type": "integer", "example": 1, "markdownDescription": "y"}, "tpye": True},
}
"""A schema with keywords of its own, and properties that are called like misspelt keywords."""


def call(**function: Any) -> dict[str, Any]:
    called = {"id": "1", "type": "function", "function": {"name": "get", **function}}
    return {"role": "assistant", "content": None, "tool_calls": [called]}


MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({"role": "assistant", "contnet": "x"}, "contnet"),
    ({"rloe": "user", "content": "x"}, "rloe"),
    ({"role": "user", "Content": "x"}, "Content"),
    ({"role": "assistant", "content": "x", "tool_cals": []}, "tool_cals"),
    ({"role": "assistant", "content": "x", "toolCalls": []}, "toolCalls"),
    ({"role": "assistant", "content": "x", "reasoning_contnet": "y"}, "reasoning_contnet"),
    ({"role": "user", "content": "x", "images": ["aGk="]}, "images"),
    ({"role": "assistant", "content": "x", "prefix": True}, "prefix"),
    ({"role": "tool", "content": "x", "tool_callid": "1"}, "tool_callid"),
    ({"role": "user", "content": [{"tpye": "text", "text": "x"}]}, "content[0].tpye"),
    ({"role": "user", "content": [{"type": "text", "text": "x", "Text": "y"}]}, "content[0].Text"),
    ({"role": "user", "content": [{"type": "image_url", "imag_url": {}}]}, "content[0].imag_url"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"ulr": ""}}]}, "content[0].image_url.ulr"),
    (call(arguemnts="{}"), "tool_calls[0].function.arguemnts"),
]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"type": "objct"}, "parameters.type': the arguments of a tool are an object; got 'objct'"),
        ({"properties": {"a": {"type": "strng"}}}, "type 'strng' at 'properties.a.type'; did you mean 'string'?"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, "look-around"),
    ],
)
def test_the_schema_of_a_forced_tool(server: Server, parameters: dict[str, Any], said: str) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("get", "put")]
    tools[1]["function"]["parameters"] = parameters
    error = refusal(server, CHAT, messages=[USER], tools=tools, tool_choice="required")
    assert error["param"].startswith("tools[1].function.parameters")
    assert said in error["message"]


def test_tools_of_one_name(server: Server) -> None:
    tools = [{"type": "function", "function": FUNCTION}] * 2
    error = refusal(server, CHAT, messages=[USER], tools=tools)
    assert error["param"] == "tools[1].function.name"


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/messages", "system"), ("/v1/responses", "input"), ("/v1/chat/completions", "guided_json")],
)
def test_a_field_of_several_types_is_named_as_it_is(server: Server, path: str, field: str) -> None:
    body = {"model": "org/scripted", **({} if field == "input" else {"messages": [USER], "max_tokens": 3}), field: 5}
    error = requests.post(server.url + path, json=body, timeout=10).json()["error"]
    assert f"Invalid '{field}': input should be a" in error["message"]
    assert " or a valid " in error["message"]


@pytest.mark.parametrize(("message", "key"), MESSAGES)
def test_keys_of_messages(server: Server, message: dict[str, Any], key: str) -> None:
    error = refusal(server, CHAT, messages=[USER, message])
    assert error["param"] == f"messages[1].{key}"
    assert f"'messages[1].{key}'" in error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions/render", "/tokenize", "/v1/score", "/v1/embeddings"])
def test_keys_of_messages_on_other_routes(server: Server, path: str) -> None:
    body: dict[str, Any] = {"model": "org/scripted", "messages": [USER, {"role": "assistant", "contnet": "x"}]}
    body |= {"choices": ["a"]} if path == "/v1/score" else {}
    response = requests.post(server.url + path, json=body, timeout=10)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages[1].contnet")


def test_what_clients_keep_beside_their_messages(server: Server) -> None:
    kept = {
        "id": "msg_1",
        "metadata": {"a": 1},
        "cache_control": {"type": "ephemeral"},
        "provider_specific_fields": {},
        "timestamp": 1,
        "source": "input",
        "model": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "reasoning_details": [],
        "thinking_blocks": [],
        "images": [],
        "prefix": False,
    }
    messages = [USER, {"role": "assistant", "content": "x", **kept}, USER]
    called = {"id": "1", "index": 0, "type": "function", "function": {"name": "get", "parsed_arguments": {}}}
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "annotations": []}
    for given in (
        messages,
        [{"role": "user", "content": [part]}],
        [USER, {"role": "assistant", "tool_calls": [called]}],
    ):
        assert "x-troupe-ignored" not in post(server, CHAT, messages=given).headers


def render(serve: Serve, template: str, **body: Any) -> requests.Response:
    loader = "tests.openai.tiny_models:load_model"
    server = serve([{"id": "tiny", "loader": loader, "kwargs": {"template": template}}])
    return requests.post(server.url + "/v1/chat/completions/render", json=body, timeout=60)


def test_unknown_keys_of_objects_are_listed_once_for_each_name(serve: Serve) -> None:
    messages = [{**USER, "mine": 1}, {"role": "assistant", "content": "x", "mine": 2}, USER]
    tools = [{"type": "function", "function": {**FUNCTION, "my_own": 1}, "theirs": 2}]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    response = render(serve, template, messages=messages, tools=tools)
    assert response.status_code == 200, response.text
    assert response.headers["x-troupe-ignored"].split(",") == [
        "messages[0].mine",
        "tools[0].theirs",
        "tools[0].function.my_own",
    ]


def test_a_key_that_the_template_reads_is_known(serve: Serve) -> None:
    template = "{% for m in messages %}{{ m.contnt }}{{ m.content }}{% endfor %}"
    response = render(serve, template, messages=[{"role": "user", "content": "b", "contnt": "a"}])
    assert (response.json()["prompt"], response.headers.get("x-troupe-ignored")) == ("ab", None)


TOOLS: list[tuple[dict[str, Any], str]] = [
    ({"type": "function", "function": {"name": "get", "paramters": SCHEMA}}, "function.paramters"),
    ({"type": "function", "function": {"name": "get", "Parameters": SCHEMA}}, "function.Parameters"),
    ({"type": "function", "function": {"name": "get", "input_schema": SCHEMA}}, "function.input_schema"),
    ({"type": "function", "function": {**FUNCTION, "strct": True}}, "function.strct"),
    ({"type": "function", "function": {**FUNCTION, "strict": "yes"}}, "function.strict"),
    ({"type": "function", "function": {**FUNCTION, "description": 5}}, "function.description"),
    ({"type": "function", "function": {"nmae": "get"}}, "function.nmae"),
    ({"type": "function", "function": FUNCTION, "strict": True}, "strict"),
    ({"tpye": "function", "function": FUNCTION}, "tpye"),
    ({"type": "function", "fucntion": FUNCTION}, "fucntion"),
]


@pytest.mark.parametrize(("tool", "key"), TOOLS)
@pytest.mark.parametrize("choice", [None, "required"])
def test_keys_of_tools(server: Server, tool: dict[str, Any], key: str, choice: str | None) -> None:
    assert refusal(server, CHAT, tools=[tool], tool_choice=choice)["param"] == f"tools[0].{key}"


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"tpye": "function", "function": {"name": "get"}}, "tool_choice.tpye"),
        ({"type": "function", "fucntion": {"name": "get"}}, "tool_choice.fucntion"),
        ({"type": "function", "function": {"nmae": "get"}}, "tool_choice.function.nmae"),
        ({"type": "fucntion", "function": {"name": "get"}}, "tool_choice"),
        ({"type": "function", "function": FUNCTION, "disable_parallel_tool_use": True}, None),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tols": []}}, "tool_choice.allowed_tools.tols"),
    ],
)
def test_keys_of_a_choice(server: Server, choice: dict[str, Any], param: str | None) -> None:
    error = refusal(server, CHAT, tools=[{"type": "function", "function": FUNCTION}], tool_choice=choice)
    assert error["param"] == (param or "tool_choice.disable_parallel_tool_use")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [USER, {"role": "assistant", "contnet": "x"}]}, "input[1].contnet"),
        ({"input": [USER, {"type": "function_call", "name": "get", "arguemnts": "{}"}]}, "input[1].arguemnts"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"tools": [{"type": "function", "name": "get", "paramters": {}}]}, "tools[0].paramters"),
    ],
)
def test_keys_of_items(server: Server, fields: dict[str, Any], param: str) -> None:
    body = {"model": "org/scripted", "input": "abcdef", **fields}
    response = requests.post(server.url + "/v1/responses", json=body, timeout=10)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_items_as_the_api_writes_them_are_taken(server: Server) -> None:
    items = [
        {**USER, "id": "msg_1", "status": "completed", "type": "message"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [], "encrypted_content": None},
    ]
    tools = [{"type": "function", "name": "get", "parameters": SCHEMA, "strict": False}]
    body = {"model": "org/scripted", "input": items, "tools": tools}
    response = requests.post(server.url + "/v1/responses", json=body, timeout=10)
    assert (response.status_code, response.headers.get("x-troupe-ignored")) == (200, None)


def test_a_default_that_a_request_does_not_go_with_is_left_out(serve: Serve) -> None:
    defaults = {"min_tokens": 4, "logprobs": True, "top_logprobs": 2, "best_of": 3, "tool_choice": "required"}
    loader = "tests.openai.scripted:load_model"
    server = serve([{"id": "org/scripted", "loader": loader, "api": {"default_params": defaults}}])
    assert sampled(server, CHAT).min_tokens == 4
    for fields in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"n_predict": 3}):
        cut = sampled(server, CHAT, **fields)
        assert (cut.max_tokens, cut.min_tokens, cut.logprobs) == (3, 0, 2)
    assert sampled(server, COMPLETIONS, max_tokens=3).min_tokens == 0
    assert refusal(server, CHAT, max_tokens=3, min_tokens=4)["param"] == "min_tokens"
    assert sampled(server, CHAT, logprobs=False).logprobs is None
    streamed = post(server, COMPLETIONS, stream=True, logprobs=None)
    assert streamed.status_code == 200, streamed.text
    response = requests.post(
        server.url + "/v1/responses",
        json={"model": "org/scripted", "input": "abcdef", "max_output_tokens": 3},
        timeout=10,
    )
    assert json.loads(response.headers["x-troupe-sampling"])["min_tokens"] == 0


@pytest.mark.parametrize(
    ("params", "key"),
    [
        ({"min_tokens": 9, "max_completion_tokens": 5}, "min_tokens"),
        ({"min_tokens": 9, "max_output_tokens": 5}, "min_tokens"),
        ({"guided_json": {"type": "objct"}}, "guided_json"),
        ({"guided_json": {"type": "object", "requried": ["a"]}}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs"),
        ({"extra_body": {"top_k": 5}}, "extra_body"),
        ({"options": {"num_predict": 5}}, "options"),
        ({"tools": [{"type": "function", "function": {"nmae": "x"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "x", "paramters": {}}}]}, "tools"),
        ({"tool_choice": "requird"}, "tool_choice"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template": "x"}, "chat_template"),
        ({"request_id": "x"}, "request_id"),
    ],
)
def test_defaults_that_no_request_could_send(params: dict[str, Any], key: str) -> None:
    assert [fault.split(":")[0] for fault in default_faults(params, ApiOptions())] == [f"default_params.{key}"]


def test_a_default_that_needs_a_request_s_own_fields_is_right() -> None:
    for params in ({"tool_choice": "required"}, {"min_tokens": 9}, {"top_logprobs": 3}):
        assert default_faults(params, ApiOptions()) == []


@pytest.mark.parametrize("number", ["1e-400", "-1e-400", "0.0000001e-400", "1e400"])
def test_numbers_that_no_float_holds(server: Server, number: str) -> None:
    body = json.dumps({"model": "org/scripted", "messages": [USER]})[:-1] + f', "temperature": {number}}}'
    headers = {"content-type": "application/json"}
    response = requests.post(server.url + CHAT, data=body, headers=headers, timeout=10)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    zero = requests.post(server.url + CHAT, data=body.replace(number, "0.0e-400"), headers=headers, timeout=10)
    assert zero.status_code == 200


def test_unknown_keys_of_a_token_check(server: Server) -> None:
    body = {"prompts": [{"model": "org/scripted", "prompt": "a", "mine": 1}]}
    response = requests.post(server.url + "/api/v1/token_check", json=body, timeout=10)
    assert response.headers["x-troupe-ignored"] == "prompts[0].mine"


def test_an_older_field_is_named_as_it_was_sent(serve: Serve) -> None:
    entry = {"id": "tiny", "loader": "tests.openai.tiny_models:load_model", "engine": {"deterministic": True}}
    server = serve([entry])
    response = requests.post(server.url + "/generate", json={"prompt": "ab", "beam_width": 2}, timeout=60)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "beam_width")


@pytest.mark.parametrize(("schema", "said"), MISSPELT)
def test_misspelt_keywords_of_schemas(server: Server, schema: dict[str, Any], said: str) -> None:
    tool = {"type": "function", "function": {**FUNCTION, "parameters": schema}}
    strict = {"type": "function", "function": {**FUNCTION, "parameters": schema, "strict": True}}
    for fields, param in (
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}, ""),
        ({"guided_json": json.dumps(schema)}, "guided_json"),
        ({"structured_outputs": {"json": schema}}, "structured_outputs.json"),
        ({"tools": [tool], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": [strict]}, "tools[0].function.parameters"),
    ):
        error = refusal(server, CHAT, **fields)
        assert error["param"] == (param or "response_format")
        assert said.strip("'") in error["message"]
    assert sampled(server, CHAT, tools=[tool]).grammar is None


def test_a_schema_may_have_keywords_of_its_own(server: Server) -> None:
    assert sampled(server, CHAT, guided_json=OWN).grammar is not None
