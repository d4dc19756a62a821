"""The Responses API through the official client, which checks every object and event."""

from __future__ import annotations

import itertools
import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import response_create_params

from deployments.openai.responses.schema import ResponsesBody
from tests.openai import scripted
from tests.openai.conftest import SCRIPTED, Serve

MODEL = "org/scripted"
BASH = {"type": "function", "name": "bash", "parameters": {"type": "object", "properties": {}}, "strict": False}
LS = '<tool_call>{"name": "bash", "arguments": {"command": "ls"}}</tool_call>'


def ask(client: OpenAI, given: Any, **fields: Any) -> Any:
    return client.responses.create(**{"model": MODEL, "input": given, **fields})


def prompt_of(response: Any) -> str:
    (engine,) = [each for each in scripted.ENGINES if each.seen and each.seen[-1].request_id.startswith(response.id)]
    return engine.seen[-1].prompt_text or ""


def test_no_field_is_missing() -> None:
    known = set(ResponsesBody.model_fields) | set(ResponsesBody.foreign)
    assert set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"} <= known


def test_a_text(client: OpenAI) -> None:
    response = ask(client, "hello", instructions="be kind", metadata={"a": "b"})
    assert response.output_text == "hello"
    assert response.status == "completed"
    assert response.usage.output_tokens == 6
    assert response.metadata == {"a": "b"}
    assert prompt_of(response) == "<system>be kind</system>\n<user>hello</user>\n<assistant>"


def test_a_budget(client: OpenAI) -> None:
    response = ask(client, "hello", max_output_tokens=2)
    assert (response.output_text, response.status) == ("he", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert ask(client, "").output_text == ""


def test_items(client: OpenAI) -> None:
    first = ask(client, f"Look: {LS}", tools=[BASH])
    message, call = first.output
    assert (message.content[0].text, call.name, json.loads(call.arguments)) == ("Look:", "bash", {"command": "ls"})
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "go"}]},
        *first.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "a file"},
    ]
    second = ask(client, items, tools=[BASH])
    assert second.output_text == "a file"
    assert "<assistant>Look:[{'id': '" in prompt_of(second)
    assert "<tool>a file</tool>" in prompt_of(second)


def test_a_stream(client: OpenAI) -> None:
    events = list(ask(client, "hi", stream=True))
    kinds = [kind for kind, _ in itertools.groupby(event.type for event in events)]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "hi"
    assert events[-1].response.output_text == "hi"
    assert events[-1].response.usage.output_tokens == 3


def test_the_clients_own_accumulator(client: OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=f"Look: {LS}{LS}", tools=[BASH]) as stream:  # type: ignore[list-item]
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.done") == 2
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    assert final.output_text == "Look:"


def test_an_empty_stream_has_an_empty_text(client: OpenAI) -> None:
    events = list(ask(client, "", stream=True))
    assert events[-1].response.output[0].content[0].text == ""


def test_reasoning(serve: Serve) -> None:
    thinker = serve([{"id": MODEL, "loader": SCRIPTED, "api": {"reasoning_parser": "think"}}]).client()
    first = ask(thinker, "<think>hm</think>yes")
    assert [item.type for item in first.output] == ["reasoning", "message"]
    assert first.output[0].content[0].text == "hm"
    events = list(ask(thinker, "<think>hm</think>yes", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "hm"
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]
    again = ask(thinker, [{"role": "user", "content": "a"}, *first.output, {"role": "user", "content": "b"}])
    assert "<assistant>yes</assistant>" in prompt_of(again)


def test_logprobs(client: OpenAI) -> None:
    response = ask(client, "a", include=["message.output_text.logprobs"], top_logprobs=1)
    assert response.output[0].content[0].logprobs[0].token == "a"
    assert response.output[0].content[0].logprobs[0].top_logprobs[0].logprob == -0.25


def test_formats(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {}}
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    response = ask(client, "{}", text=text)
    (engine,) = [each for each in scripted.ENGINES if each.seen and each.seen[-1].request_id.startswith(response.id)]
    assert json.loads(engine.seen[-1].sampling.grammar.source) == schema  # type: ignore[union-attr]
    named = ask(client, '{"command": "ls"}', tools=[BASH], tool_choice={"type": "function", "name": "bash"})
    assert named.output[0].name == "bash"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"extra_body": {"n": 2}}, "n"),
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
    ],
)
def test_mistakes(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **{"given": fields.pop("input", "x"), **fields})
    assert error.value.param == param


def test_failures(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError):
        ask(client, "[fail out_of_memory]", stream=True)
    events = list(ask(client, "[wait 0.05][after 2 fail model_error]abcd", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "ab"
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2].code == "model_error"
    assert events[-1].response.status == "failed"
