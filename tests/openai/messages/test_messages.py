"""The Messages API through Anthropic's own client, which checks every object and event."""

from __future__ import annotations

import itertools
import json
from typing import Any

import anthropic
import pytest
import requests
from anthropic import Anthropic
from anthropic.types import message_count_tokens_params, message_create_params

from deployments.core.calls import Turn
from deployments.core.errors import BadRequest
from deployments.openai.messages.conversation import Conversation
from deployments.openai.messages.schema import CountTokensBody, MessagesBody
from tests.openai import scripted
from tests.openai.conftest import SCRIPTED, Serve, Server

MODEL = "org/scripted"
BASH = {"name": "bash", "description": "Run it.", "input_schema": {"type": "object", "properties": {}}}
LS = '<tool_call>{"name": "bash", "arguments": {"command": "ls"}}</tool_call>'
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def connected(server: Server, **options: Any) -> Anthropic:
    options = {"api_key": "none", "max_retries": 0, "timeout": 20, "_strict_response_validation": True, **options}
    return Anthropic(base_url=server.url, **options)


@pytest.fixture(scope="module")
def claude(server: Server) -> Anthropic:
    return connected(server)


@pytest.fixture(scope="module")
def thinker(serve: Serve) -> Anthropic:
    return connected(serve([{"id": MODEL, "loader": SCRIPTED, "api": {"reasoning_parser": "think"}}]))


def ask(api: Anthropic, messages: Any, **fields: Any) -> Any:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return api.messages.create(**{"model": MODEL, "max_tokens": 100, "messages": messages, **fields})


def seen(message: Any) -> Any:
    """The engine's request for an answer."""
    (found,) = [r for e in scripted.ENGINES for r in e.seen if r.request_id.startswith(f"{message.id}-")]
    return found


def refusal(api: Anthropic, messages: Any = "x", **fields: Any) -> str:
    with pytest.raises(anthropic.BadRequestError) as error:
        ask(api, messages, **fields)
    body = error.value.body
    assert isinstance(body, dict)
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["request_id"] == error.value.request_id == error.value.response.headers["x-request-id"]
    return str(body["error"]["message"])


def test_no_field_is_missing() -> None:
    known = set(MessagesBody.model_fields) | set(MessagesBody.foreign)
    assert set(message_create_params.MessageCreateParamsBase.__annotations__) | {"stream"} <= known
    known = set(CountTokensBody.model_fields) | set(CountTokensBody.foreign)
    assert set(message_count_tokens_params.MessageCountTokensParams.__annotations__) <= known


def test_a_text(claude: Anthropic) -> None:
    message = ask(claude, "hello", system="be kind")
    assert [(block.type, block.text) for block in message.content] == [("text", "hello")]
    assert (message.stop_reason, message.stop_sequence, message.model) == ("end_turn", None, MODEL)
    assert seen(message).prompt_text == "<system>be kind</system>\n<user>hello</user>\n<assistant>"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (len(seen(message).prompt_text), 6)
    assert (message.usage.cache_read_input_tokens, message.usage.cache_creation_input_tokens) == (0, 0)
    assert message._request_id


def test_why_an_answer_ends(claude: Anthropic) -> None:
    assert ask(claude, "hello", max_tokens=2).stop_reason == "max_tokens"
    stopped = ask(claude, "hello", stop_sequences=["x", "l"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "l", "he")
    assert ask(claude, "").content == []


def test_sampling_reaches_the_engine(claude: Anthropic) -> None:
    extra = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 4, "repetition_penalty": 1.5}
    message = ask(claude, "a", extra_body=extra)
    params = seen(message).sampling
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 7, 100)
    assert (params.min_p, params.seed, params.repetition_penalty) == (0.1, 4, 1.5)


def test_the_user_and_the_priority_decide_its_turn(claude: Anthropic) -> None:
    message = ask(claude, "a", metadata={"user_id": "me"}, extra_body={"priority": 3})
    assert seen(message).turn == Turn(priority=3, client="me")
    message = ask(claude, "a", metadata={"user_id": "me"}, extra_headers={"x-session-affinity": "s1"})
    assert seen(message).turn == Turn(client="s1")


def test_tools_there_and_back(claude: Anthropic) -> None:
    first = ask(claude, f"Look: {LS}", tools=[BASH])
    text, call = first.content
    assert (text.text, call.type, call.name, call.input) == ("Look:", "tool_use", "bash", {"command": "ls"})
    assert call.id.startswith("toolu_")
    assert first.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "no file"}]}
    history = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [{**result, "is_error": True}, {"type": "text", "text": "and?"}]},
    ]
    second = ask(claude, history, tools=[BASH])
    prompt = seen(second).prompt_text
    assert f"<assistant>Look:[{{'id': '{call.id}'" in prompt
    assert prompt.index("<tool>Error: no file</tool>") < prompt.index("<user>and?</user>")
    assert '"name": "bash"' in prompt or "'name': 'bash'" in prompt


@pytest.mark.parametrize(
    ("choice", "text", "names"),
    [
        ({"type": "tool", "name": "bash"}, '{"command": "ls"}', ["bash"]),
        ({"type": "any"}, '[{"name": "bash", "arguments": {}}, {"name": "bash", "arguments": {}}]', ["bash", "bash"]),
        ({"type": "auto"}, LS + LS, ["bash", "bash"]),
        ({"type": "auto", "disable_parallel_tool_use": True}, LS + LS, ["bash"]),
        ({"type": "none"}, LS, []),
    ],
)
def test_the_choice_among_tools(claude: Anthropic, choice: Any, text: str, names: list[str]) -> None:
    message = ask(claude, text, tools=[BASH], tool_choice=choice, max_tokens=400)
    assert [block.name for block in message.content if block.type == "tool_use"] == names


def test_a_stream(claude: Anthropic) -> None:
    with claude.messages.stream(
        model=MODEL,
        max_tokens=100,
        messages=[{"role": "user", "content": f"Look: {LS}"}],
        tools=[BASH],  # type: ignore[list-item]
    ) as stream:
        kinds = [kind for kind, _ in itertools.groupby(event.type for event in stream)]
        final = stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert {"text", "input_json"} <= set(kinds)
    assert [block.type for block in final.content] == ["text", "tool_use"]
    assert final.content[1].input == {"command": "ls"}  # type: ignore[union-attr]
    assert final.stop_reason == "tool_use"
    whole = ask(claude, f"Look: {LS}", tools=[BASH])
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_events_of_a_stream_as_they_are_sent(server: Server) -> None:
    body = {"model": MODEL, "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    response = requests.post(f"{server.url}/v1/messages?beta=true", json=body, timeout=10)
    events = [dict(line.split(": ", 1) for line in each.split("\n")) for each in response.text.strip().split("\n\n")]
    data = [json.loads(event["data"]) for event in events]
    assert [event["event"] for event in events] == [each["type"] for each in data]
    kinds = [kind for kind, _ in itertools.groupby(each["type"] for each in data)]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", "ping", *block, "message_delta", "message_stop"]
    assert data[0]["message"]["content"] == []
    assert data[0]["message"]["usage"]["input_tokens"] > 0
    assert data[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert response.headers["x-troupe-fingerprint"]
    assert json.loads(response.headers["x-troupe-sampling"])["max_tokens"] == 9


def test_thinking_there_and_back(thinker: Anthropic) -> None:
    fields: Any = {"thinking": {"type": "enabled", "budget_tokens": 50}}
    first = ask(thinker, "<think>hm</think>yes", **fields)
    thought, text = first.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "hm", "yes")
    assert thought.signature
    assert seen(first).sampling.thinking.tokens == 50
    assert "<enable_thinking>True</enable_thinking>" in seen(first).prompt_text
    redacted = {"type": "redacted_thinking", "data": "secret"}
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [*first.content, redacted]},
        {"role": "user", "content": "b"},
    ]
    assert "<assistant>yes</assistant>" in seen(ask(thinker, history)).prompt_text
    hidden = ask(thinker, "<think>hm</think>yes", thinking={"type": "disabled"})
    assert [block.type for block in hidden.content] == ["text"]


def test_thinking_in_a_stream(thinker: Anthropic) -> None:
    events = list(ask(thinker, "<think>hm</think>yes", stream=True))
    kinds = [event.delta.type for event in events if event.type == "content_block_delta"]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["thinking_delta", "signature_delta", "text_delta"]
    assert [event.index for event in events if event.type == "content_block_stop"] == [0, 1]


def test_a_model_that_does_not_reason_answers_at_once(claude: Anthropic) -> None:
    message = ask(claude, "yes", thinking={"type": "enabled", "budget_tokens": 1024})
    assert message.content[0].text == "yes"
    assert seen(message).sampling.thinking is None


def test_images_and_documents(claude: Anthropic) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    assert "image" in refusal(claude, [{"role": "user", "content": [{"type": "image", "source": source}]}])
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "d"}}
    content = [document, {"type": "text", "text": "q"}]
    prompt = seen(ask(claude, [{"role": "user", "content": content}])).prompt_text
    assert "T\n" in prompt
    assert "d" in prompt


def test_an_answer_that_is_begun_is_continued(claude: Anthropic) -> None:
    history = [
        {"role": "user", "content": "say"},
        {"role": "assistant", "content": [{"type": "text", "text": "Well,"}]},
    ]
    assert seen(ask(claude, history)).prompt_text.endswith("<user>say</user>\n<assistant>Well,")


def test_json_that_follows_a_schema(claude: Anthropic) -> None:
    schema = {"type": "object", "properties": {}}
    message = ask(claude, "{}", output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(seen(message).sampling.grammar.source) == schema


def test_tokens_are_counted_as_they_are_used(claude: Anthropic) -> None:
    asked: Any = {
        "model": MODEL,
        "system": [{"type": "text", "text": "be kind"}],
        "tools": [BASH],
        "messages": [{"role": "user", "content": "hello"}],
    }
    counted = claude.messages.count_tokens(**asked)
    assert counted.input_tokens == claude.messages.create(max_tokens=3, **asked).usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "'messages'"),
        ({"messages": [5]}, "'messages[0]'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages[0].role'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages[0].content[0].text'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'messages[0].content[0]'"),
        ({"messages": [{"role": "user", "content": None}]}, "'messages[0].content'"),
        ({"system": [{"type": "image"}]}, "'system[0]'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"tools": [{"name": "bash"}]}, "'tools[0]'"),
        ({"tools": [BASH], "tool_choice": {"type": "tool", "name": "sh"}}, "no tool is named 'sh'"),
        ({"tools": [BASH], "tool_choice": {"type": "some"}}, "'tool_choice'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "'thinking.budget_tokens'"),
        ({"max_tokens": 0}, "'max_tokens'"),
        ({"extra_body": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, "'mcp_servers'"),
        ({"extra_body": {"temperature": -1}}, "'temperature'"),
    ],
)
def test_mistakes(claude: Anthropic, fields: dict[str, Any], message: str) -> None:
    assert message in refusal(claude, fields.pop("messages", "x"), **fields)


def test_max_tokens_is_required(server: Server) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    response = requests.post(f"{server.url}/v1/messages", json=body, timeout=10)
    assert response.status_code == 400
    assert "max_tokens" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("messages[0].content", "system"),
        ("messages[2].content", "messages[1].content[0].content"),
        ("messages[3].content[0].image_url.url", "messages[1].content[1]"),
        ("messages[4].tool_calls[0].function.arguments", "messages[2].content[1]"),
        ("messages[4].content", "messages[2].content"),
    ],
)
def test_an_error_in_the_chat_names_the_block(place: str, named: str) -> None:
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/y.png"}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
    call = {"type": "tool_use", "id": "b", "name": "bash", "input": {}}
    history = [
        {"role": "user", "content": "q"},
        {"role": "user", "content": [result, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "t"}, call]},
    ]
    error = BadRequest(f"Invalid '{place}': no.", param=place)
    Conversation("s", history).rename(error)
    assert (error.param, error.message) == (named, f"Invalid '{named}': no.")


def test_every_path_of_the_api_has_its_errors(server: Server, serve: Serve) -> None:
    for method, path in (("GET", "/v1/messages/batches"), ("GET", "/v1/messages"), ("POST", "/v1/messages/batches")):
        answer = requests.request(method, server.url + path, timeout=20)
        assert (answer.status_code in (404, 405), answer.json()["type"]) == (True, "error"), path
    closed = serve([{"id": MODEL, "loader": SCRIPTED}], api_keys=["k"])
    refused = requests.post(f"{closed.url}/v1/messages", json={}, timeout=20)
    assert (refused.status_code, "x-api-key" in refused.json()["error"]["message"]) == (401, True)


def test_wrong_roles_and_efforts(claude: Anthropic) -> None:
    assert "user, assistant or system" in refusal(claude, [{"role": "tool", "content": "x"}])
    assert "output_config.effort" in refusal(claude, output_config={"effort": "hi"})


def test_unknown_keys_are_listed(claude: Anthropic) -> None:
    content = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "color": "red"}]
    messages: Any = [{"role": "user", "content": content}]
    raw = claude.messages.with_raw_response.create(model=MODEL, max_tokens=5, messages=messages)
    assert raw.headers["x-troupe-ignored"] == "messages[0].content[0].color"


def test_a_prompt_that_is_too_long_says_so_in_anthropics_words(claude: Anthropic) -> None:
    found = refusal(claude, "x" * 3000)
    assert found.startswith("prompt is too long: 30")
    assert "tokens > 2000 maximum" in found


def test_failures(claude: Anthropic) -> None:
    with pytest.raises(anthropic.APIStatusError) as error:
        ask(claude, "[fail out_of_memory]", stream=True)
    assert error.value.status_code == 529
    assert error.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]
    with pytest.raises(anthropic.InternalServerError) as broken:
        ask(claude, "[fail model_error]")
    assert broken.value.body["error"]["type"] == "api_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError) as missing:
        ask(claude, "x", model="none")
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.APIStatusError, match="half way"):
        list(ask(claude, "[wait 0.05][after 2 fail model_error]abcd", stream=True))


def test_keys(serve: Serve) -> None:
    guarded = serve(api_keys=["sesame"])
    assert ask(connected(guarded, api_key="sesame"), "a").content[0].text == "a"
    assert ask(connected(guarded, api_key=None, auth_token="sesame"), "a").content[0].text == "a"
    with pytest.raises(anthropic.AuthenticationError) as error:
        ask(connected(guarded), "a")
    assert error.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
