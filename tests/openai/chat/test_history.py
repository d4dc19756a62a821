"""The model is shown what the client sent, whatever its template reads; or the client is told what it would not see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import requests

from tests.openai.conftest import Serve, Server
from tests.openai.templates import HISTORIES

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "go"}
SYSTEM = {"role": "system", "content": "x"}
TEXT_PARTS = [{"type": "text", "text": "x"}]
RESULT = {"role": "tool", "tool_call_id": "call_one1", "content": "12:00"}
DROPPED = "does not write"


def call(arguments: Any = '{"at": "sea"}', name: str = "look", call_id: str = "call_one1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any], content: Any = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls) or [call()]}


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    engine = {"pack_linears": False, "threads": 1}
    path = "tests.openai.templates"

    def entries(loader: str, key: str, kinds: Iterable[str], prefix: str = "") -> list[dict[str, Any]]:
        return [{"id": prefix + kind, "loader": f"{path}:{loader}", "kwargs": {key: kind}} for kind in kinds]

    models = [
        *entries("load_template", "style", HISTORIES),
        *entries("load_named", "kind", ("dict", "list"), "named "),
        *entries("load_function", "kind", ("whole", "texts", "last")),
        {"id": "plain", "loader": f"{path}:load_plain"},
        {
            "id": "merging",
            "loader": f"{path}:load_template",
            "kwargs": {"style": "parts of users"},
            "api": {"merge_consecutive_roles": True},
        },
    ]
    return serve([{**model, "engine": engine} for model in models], allow_request_chat_template=True)


def ask(server: Server, model: str, messages: list[Any], **more: Any) -> Any:
    """The prompt of these messages, or the error."""
    body = {"model": model, "messages": messages, "add_generation_prompt": False, **more}
    answer = requests.post(server.url + "/v1/chat/completions/render", json=body, timeout=60).json()
    return answer["prompt"] if "prompt" in answer else answer["error"]


@pytest.mark.parametrize(
    ("model", "messages", "param"),
    [
        ("no calls", [USER, calling(), RESULT], "messages[1].tool_calls[0]"),
        ("names alone", [USER, calling(), RESULT], "messages[1].tool_calls[0].function.arguments"),
        ("first call", [USER, calling(call(), call(name="hear")), RESULT], "messages[1].tool_calls[1]"),
        ("only null", [USER, calling(content="I look."), RESULT], "messages[1].tool_calls[0]"),
        ("no results", [USER, calling(), RESULT], "messages[2].content"),
        (
            "no results",
            [USER, calling(), {**RESULT, "content": TEXT_PARTS}],
            "messages[2].content",
        ),
        ("no results", [USER, calling(), {**RESULT, "role": "function", "name": "look"}], "messages[2].content"),
        ("no third role", [USER, calling(), RESULT], "messages[2].content"),
        ("no third role", [USER, {"role": "toool", "content": "x"}], "messages[1].content"),
        ("no third role", [SYSTEM, USER], "messages[0].content"),
        ("no third role", [{"role": "developer", "content": "x"}, USER], "messages[0].content"),
        ("system first", [USER, SYSTEM, USER], "messages[1].content"),
        (
            "last system",
            [{"role": "system", "content": "go"}, {"role": "system", "content": "go"}, USER],
            "messages[0]",
        ),
        ("texts", [USER, calling(), RESULT], "messages[1].tool_calls[0]"),
        ("last", [USER, calling(), RESULT], "messages[1].tool_calls[0]"),
        ("last", [RESULT, {"role": "narrator", "content": "x"}, USER], "messages[0].content"),
        ("plain", [USER, calling(), RESULT], "messages[1].tool_calls[0]"),
    ],
)
def test_what_a_template_leaves_out_is_refused(server: Server, model: str, messages: list[Any], param: str) -> None:
    """Each time: a pattern that is once refused is not taken for known."""
    for _ in range(2):
        error = ask(server, model, messages)
        assert DROPPED in error["message"]
        assert error["param"].startswith(param)
        assert error["code"] == "chat_template_error"


def test_a_known_beginning_does_not_hide_what_is_left_out(server: Server) -> None:
    """Of several system messages this template writes the last, so one alone proves nothing of two."""
    system = {"role": "system", "content": "Be brief."}
    turn = [USER, {"role": "assistant", "content": "yes"}, system]
    assert "Be brief." in ask(server, "last system", [*turn, USER])
    assert ask(server, "last system", [*turn, *turn, USER])["param"] == "messages[2].content"


@pytest.mark.parametrize(
    "model", ["object", "string", "printed", "text or object", "concatenates", "told apart", "calls or text"]
)
def test_an_agents_conversation_reaches_the_prompt(server: Server, model: str) -> None:
    messages: list[Any] = [{"role": "system", "content": "S1"}, USER]
    for turn in range(4):
        first, second = call(f'{{"n": "first{turn}"}}'), call(f'{{"n": "second{turn}"}}', "hear", "call_two2")
        results = [
            {**RESULT, "content": f"one{turn}"},
            {**RESULT, "tool_call_id": "call_two2", "content": f"two{turn}"},
        ]
        messages += [calling(first, second), *results, calling(first, content="Again."), results[0]]
        messages += [{"role": "assistant", "content": f"answer{turn}"}, {"role": "user", "content": f"more{turn}"}]
        prompt = ask(server, model, messages, tools=[TOOL])
        expected = ("first", "second", "one", "two", "answer", "more")
        assert all(f"{text}{i}" in prompt for text in expected for i in range(turn + 1))
        assert "None" not in prompt


@pytest.mark.parametrize("content", [None, "", "absent"])
@pytest.mark.parametrize(
    ("model", "written"),
    [
        ("object", "<assistant>[look"),
        ("only null", "<assistant>[look"),
        ("concatenates", "<assistant>[look"),
        ("told apart", "<assistant>"),
        ("whole", "'name': 'look'"),
    ],
)
def test_calls_without_text(server: Server, model: str, written: str, content: str | None) -> None:
    message = calling(content=content)
    if content == "absent":
        del message["content"]
    prompt = ask(server, model, [USER, message, RESULT])
    assert written in prompt
    assert "None" not in prompt
    if model == "told apart":
        assert ("()" in prompt) == (content == "")


@pytest.mark.parametrize(
    ("model", "written"),
    [
        ("object", '[look {"at": "sea"}]'),
        ("string", '[look {"at": "sea"}]'),
        ("printed", '[look {"at": "sea"}]'),
        ("text or object", '[look {"at": "sea"}]'),
        ("items", "[look at=sea;]"),
        ("whole", "{'at': 'sea'}"),
    ],
)
@pytest.mark.parametrize("sent", ['{"at": "sea"}', {"at": "sea"}])
def test_arguments_as_the_template_wants_them(server: Server, model: str, written: str, sent: Any) -> None:
    assert written in ask(server, model, [USER, calling(call(sent)), RESULT])


@pytest.mark.parametrize("sent", ["{}", "", " ", "null", None, {}])
@pytest.mark.parametrize("model", ["object", "string", "printed", "items"])
def test_no_arguments(server: Server, model: str, sent: Any) -> None:
    written = "[look ]" if model == "items" else "[look {}]"
    assert written in ask(server, model, [USER, calling(call(sent)), RESULT])
    missing = calling(call())
    del missing["tool_calls"][0]["function"]["arguments"]
    assert written in ask(server, model, [USER, missing, RESULT])


@pytest.mark.parametrize(
    ("model", "sent", "written"),
    [
        ("string", '{"at": "se', '[look {"at": "se]'),
        ("text or object", '{"at": "se', '[look {"at": "se]'),
        ("object", '{"at": "se', r'[look "{\"at\": \"se"]'),
        ("items", '{"at": "se', '[look arguments={"at": "se;]'),
        ("object", '["sea"]', '[look ["sea"]]'),
        ("items", '["sea"]', '[look arguments=["sea"];]'),
        ("items", "7", "[look arguments=7;]"),
        ("object", ["sea"], '[look ["sea"]]'),
        ("string", ["sea"], '[look ["sea"]]'),
    ],
)
def test_a_model_sees_the_arguments_that_it_wrote_wrong(server: Server, model: str, sent: Any, written: str) -> None:
    assert written in ask(server, model, [USER, calling(call(sent)), RESULT])


def test_a_call_id_that_the_template_refuses(server: Server) -> None:
    error = ask(
        server, "nine letters", [USER, {"role": "assistant", "content": "x"}, USER, calling(call(call_id="7")), RESULT]
    )
    assert error["param"] == "messages[3]"
    assert "refuses messages[3]: TemplateError: nine letters" in error["message"]
    assert "[look" in ask(server, "nine letters", [USER, calling(), RESULT])


def test_ids_that_stand_for_names(server: Server) -> None:
    """Kimi's template writes ids in place of names, so the ids have to name the functions."""
    again = {**RESULT, "tool_call_id": "call_two2"}
    prompt = ask(server, "named by id", [USER, calling(call(), call(call_id="call_two2")), RESULT, again])
    assert "[functions.look:0 " in prompt
    assert "[functions.look:1 " in prompt
    assert prompt.endswith("12:00functions.look:0</tool><tool>12:00functions.look:1</tool>")
    own = call(call_id="functions.look:7")
    prompt = ask(server, "named by id", [USER, calling(own), {**RESULT, "tool_call_id": "functions.look:7"}])
    assert prompt.count("functions.look:7") == 2


@pytest.mark.parametrize(
    ("model", "role", "written"),
    [
        ("object", "developer", "<system>x</system>"),
        ("developer", "developer", "x</developer>"),
        ("developer", "system", "<system>x</system>"),
        ("object", "agent", "<assistant>x</assistant>"),
        ("object", "narrator", "<narrator>x</narrator>"),
        ("whole", "developer", "<system>x"),
        ("object", "function", "<tool>x</tool>"),
        ("object", "ipython", "<tool>x</tool>"),
        ("ipython", "ipython", "<ipython>x</ipython>"),
        ("ipython", "tool", "<ipython>x</ipython>"),
        ("ipython", "function", "<ipython>x</ipython>"),
    ],
)
def test_roles_that_the_template_knows_pass(server: Server, model: str, role: str, written: str) -> None:
    message = {"role": role, "content": "x"}
    history = [USER, calling(), message] if role in ("function", "ipython", "tool") else [message, USER]
    assert written in ask(server, model, history)


PARTS = [{"type": "text", "text": "abc"}, {"type": "text", "text": "def"}]


@pytest.mark.parametrize(
    ("model", "role", "written"),
    [
        ("object", "user", "abc\ndef"),
        ("object", "tool", "abc\ndef"),
        ("object", "assistant", "abc\ndef"),
        ("parts of users", "user", "abcdef"),
        ("parts of users", "system", "abc\ndef"),
        ("parts of users", "tool", "abc\ndef"),
        ("parts of tools", "tool", "abcdef"),
        ("parts of tools", "user", "abc\ndef"),
        ("dumped parts", "tool", '"abc\\ndef"'),
        ("whole", "user", "abc\ndef"),
        ("plain", "user", "abc\ndef"),
    ],
)
def test_parts_as_the_template_reads_them(server: Server, model: str, role: str, written: str) -> None:
    message = {"role": role, "content": PARTS}
    history = [USER, calling(), {**RESULT, **message}] if role == "tool" else [message, USER]
    if model == "plain" and role == "user":
        history = [message]
    assert written in ask(server, model, history)
    mixed = [*history[:-1], {**history[-1], "content": ["abc", {"type": "input_text", "text": "def"}]}]
    assert "abc" in ask(server, model, mixed)


def test_neighbors_of_one_role_are_joined_in_any_form(server: Server) -> None:
    users = [USER, {"role": "user", "content": PARTS}]
    assert ask(server, "merging", users) == "go\n\nabcdef</user>"
    systems = [{"role": "system", "content": "S"}, {"role": "developer", "content": "D"}, USER]
    assert ask(server, "merging", systems) == "<system>S\n\nD</system>go</user>"


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_named_templates(server: Server, kind: str) -> None:
    model = f"named {kind}"
    assert '"look"' in ask(server, model, [USER], tools=[TOOL])
    assert ask(server, model, [USER]) == "<user>go</user>"
    assert ask(server, model, [USER], chat_template="rag")["code"] == "chat_template_error"
    body = {"model": model, "messages": [USER], "tools": [TOOL], "max_tokens": 1}
    assert requests.post(server.url + "/v1/chat/completions", json=body, timeout=60).status_code == 200
    info = requests.get(server.url + "/tokenizer_info", params={"model": model}, timeout=60).json()
    assert set(info["chat_templates"]) == {"default", "tool_use", "rag"}
    assert info["chat_template"] == info["chat_templates"]["default"]


@pytest.mark.parametrize("model", ["plain", "texts", "last"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/completions/render", "/tokenize"])
def test_tools_that_would_not_be_shown_are_refused_everywhere(server: Server, model: str, path: str) -> None:
    body = {"model": model, "messages": [USER], "tools": [TOOL]}
    error = requests.post(server.url + path, json=body, timeout=60).json()["error"]
    assert "has no place for tools" in error["message"]
    assert error["param"] == "tools"


def test_a_functions_own_choice_of_messages_is_left_to_it(server: Server) -> None:
    assert (
        ask(server, "last", [{"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}, USER]) == "go"
    )


def test_the_forms_that_were_found_are_shown(server: Server) -> None:
    info = requests.get(server.url + "/tokenizer_info", params={"model": "only null"}, timeout=60).json()
    assert info["chat_template_forms"]["null_content"] == {"with_calls": "null", "without_calls": "null"}
    info = requests.get(server.url + "/tokenizer_info", params={"model": "printed"}, timeout=60).json()
    assert info["chat_template_forms"]["arguments"] == "string"


def test_the_responses_api_goes_the_same_way(server: Server) -> None:
    items: list[Any] = [
        {"type": "message", "role": "user", "content": "go"},
        {"type": "function_call", "call_id": "call_one1", "name": "look", "arguments": ""},
        {"type": "function_call_output", "call_id": "call_one1", "output": PARTS},
    ]
    for model, status in (("object", 200), ("no calls", 400), ("no results", 400)):
        body = {"model": model, "input": items, "max_output_tokens": 1}
        answer = requests.post(server.url + "/v1/responses", json=body, timeout=60)
        assert answer.status_code == status
        assert status == 200 or DROPPED in answer.json()["error"]["message"]
