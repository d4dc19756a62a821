"""Conversations that agents and checkpoints of all kinds bring: every word reaches the prompt, or an error names it."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from tests.openai.conftest import Serve, Server

USER = {"role": "user", "content": "go"}
SYSTEM = {"role": "system", "content": "be brief"}
DEVELOPER = {"role": "developer", "content": "be kind"}
RESULT = {"role": "tool", "tool_call_id": "call_one1", "content": "12:00"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
KNOWN = (
    "{% for c in m.tool_calls or [] %}{% if c.function.name not in tools | map(attribute='function') "
    "| map(attribute='name') %}{{ raise_exception('unknown tool') }}{% endif %}"
)
# A template, written small, for each habit.
ONE_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
ONLY_NULL = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is none %}"
    "{% for c in m.tool_calls %}[{{ c.function | tojson }}]{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NOT_EMPTY = (
    "{% for m in messages %}{% if not m.content %}{{ raise_exception('say something') }}{% endif %}"
    "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"
)
KNOWN_NAMES = TOOLS + "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}" + KNOWN + "{% endfor %}{% endfor %}"
ONE_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}<{{ m.role }}>{{ m.content }}{% endif %}"
    "{% endfor %}"
)
SYSTEM_INSIDE = (
    "{% set first = messages[0].role == 'system' %}{% for m in messages[1:] if first %}{{ messages[0].content }} "
    "{{ m.content }}{% endfor %}{% for m in messages if not first %}{{ m.content }}{% endfor %}"
)
LAST_FOUR = "{% for m in messages[-4:] %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOLS_OF_SYSTEM = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'system' %}{{ tools | tojson }}{% endif %}"
    "{% endfor %}"
)
TOOLS_OR_SYSTEM = "{% if messages[0].role != 'system' %}" + TOOLS + "{% endif %}" + TURNS
NEEDS_TOOLS = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + TURNS
BROKEN = "{{ 'a' + 1 }}" + TURNS
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '[' + p.thinking + ']' if p.type == 'thinking' else p.text }}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    model = {"id": "any", "loader": "tests.openai.tiny_models:load_model", "engine": {"threads": 1}}
    return serve([model], allow_request_chat_template=True)


def ask(server: Server, template: str, messages: list[Any], **more: Any) -> Any:
    """The prompt of these messages, or the error."""
    body = {"model": "any", "chat_template": template, "messages": messages, "add_generation_prompt": False, **more}
    answer = requests.post(server.url + "/v1/chat/completions/render", json=body, timeout=60)
    assert answer.status_code in (200, 400)
    return answer.json()["prompt"] if answer.ok else answer.json()["error"]


def calling(arguments: str = '{"at": "sea"}', **fields: Any) -> dict[str, Any]:
    function = {"name": "look", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "call_one1", "type": "function", "function": function}],
        **fields,
    }


def answered(**fields: Any) -> list[Any]:
    return [USER, {"role": "assistant", **fields}, USER]


def parts(*texts: str) -> list[Any]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("template", "messages", "prompt"),
    [
        (ONE_PART, [SYSTEM, USER], "<system>be brief<user>go"),
        (ONE_PART, [{"role": "user", "content": parts("a", "b")}], "<user>a\nb"),
        (ONE_PART, answered(content=""), "<user>go<assistant><user>go"),
        (ONE_PART, answered(content=None), "<user>go<assistant><user>go"),
        (NOT_EMPTY, answered(content=""), "<user>go<assistant><user>go"),
        (NOT_EMPTY, answered(content=[]), "<user>go<assistant><user>go"),
        (TURNS, answered(content="", refusal="I can't."), "<user>go<assistant>I can't.<user>go"),
        (TURNS, answered(content=[], refusal="I can't."), "<user>go<assistant>I can't.<user>go"),
        (TURNS, answered(content=None, audio={"id": "a", "transcript": "Hm."}), "<user>go<assistant>Hm.<user>go"),
        (TURNS, answered(content="Hm.", audio={"id": "a"}), "<user>go<assistant>Hm.<user>go"),
        (ONE_SYSTEM, [SYSTEM, DEVELOPER, USER], "<system>be brief<developer>be kind<user>go"),
        (
            THINKING,
            answered(content=[{"type": "thinking", "thinking": "Hm"}, *parts("yes")]),
            "<user>go<assistant>[Hm]yes<user>go",
        ),
        (LAST_FOUR, [USER, SYSTEM] * 2, "<user>go<system>be brief" * 2),
    ],
)
def test_what_the_client_says_is_in_the_prompt(server: Server, template: str, messages: list[Any], prompt: str) -> None:
    assert ask(server, template, messages) == prompt


@pytest.mark.parametrize("content", [None, "", [], parts(""), parts("", "")])
def test_no_text_beside_calls_in_any_form(server: Server, content: Any) -> None:
    prompt = ask(server, ONLY_NULL, [USER, calling(content=content), RESULT])
    assert '"name": "look"' in prompt
    assert "sea" in prompt


@pytest.mark.parametrize(
    ("template", "messages", "param"),
    [
        (KNOWN_NAMES, [USER, calling(), RESULT], "messages[1].tool_calls[0].function.arguments"),
        (SYSTEM_INSIDE, [SYSTEM], "messages[0].content"),
        (NO_SYSTEM, [SYSTEM], "messages[0]"),
        (NO_SYSTEM, [SYSTEM, USER], "messages[0]"),
        (TURNS, answered(content=None, audio={"id": "a"}), "messages[1].audio"),
        (TURNS, [USER, {"role": "user", "content": [*parts("x"), {"type": "file"}]}], "messages[1].content[1]"),
        (TURNS, answered(content=[{"type": "thinking", "thinking": "Hm"}]), "messages[1].content[0]"),
    ],
)
def test_what_does_not_reach_the_prompt_is_named(
    server: Server, template: str, messages: list[Any], param: str
) -> None:
    assert ask(server, template, messages, tools=[TOOL] if template == KNOWN_NAMES else None)["param"] == param


def turns(content: str) -> str:
    """A template of turns, with what it writes of a message's content."""
    return "{% for m in messages %}<{{ m.role }}>" + content + "{% endfor %}"


def unless(condition: str) -> str:
    """A template of the turns of which something does not hold."""
    return f"{{% for m in messages if not ({condition}) %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{{% endfor %}}"


SAYS = {"role": "assistant", "content": "<think>why</think>so"}


@pytest.mark.parametrize(
    ("template", "word"),
    [
        (unless("'secret' in m.content"), "the secret is 42"),
        (unless("m.content | length > 20"), "the secret is 42, and more"),
        (unless("m.content.startswith('/')"), "/help"),
        (turns("{{ m.content[:20] }}"), "the secret is 42, and more"),
        (turns("{{ m.content | truncate(20) }}"), "the secret is 42, and more"),
        (turns("{{ m.content.split('\\n')[0] }}"), "the secret is\n42"),
        (turns("{{ m.content.split('</think>')[-1] }}"), "what does </think> mean?"),
        (turns("{{ m.content.split('#')[0] }}"), "number #2"),
    ],
)
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_what_is_left_out_for_its_words_is_named(server: Server, template: str, word: str, role: str) -> None:
    message = {"role": role, "content": word, **({"tool_call_id": "call_one1"} if role == "tool" else {})}
    assert "go" in ask(server, template, [USER, {**message, "content": "a"}, USER])
    for talk in ([USER], [USER, {"role": "assistant", "content": "<think>a</think>b"}, USER]):
        for content in (word, [{"type": "text", "text": word}]):
            error = ask(server, template, [*talk, {**message, "content": content}, USER])
            assert error["param"] == f"messages[{len(talk)}].content"


@pytest.mark.parametrize(("condition", "word"), [("m.content.strip().isdigit()", "1"), ("m.content.isupper()", "NO")])
def test_what_is_left_out_for_its_kind_is_named_also_if_the_prompt_has_it_elsewhere(
    server: Server, condition: str, word: str
) -> None:
    talk = [USER, {"role": "assistant", "content": "is it 1?"}]
    assert "is it" in ask(server, unless(condition), [*talk, USER, {**USER, "content": f"{word} is in it"}])
    error = ask(server, unless(condition), [*talk, {**USER, "content": word}, {**USER, "content": f"{word} is in it"}])
    assert error["param"] == "messages[2].content"


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("{{ m.content.split('</think>')[-1] }}", "<user>go<assistant>so<user>a < b"),
        ("{{ m.content | upper }}", "<user>GO<assistant><THINK>WHY</THINK>SO<user>A < B"),
        ("{{ m.content | e }}", "<user>go<assistant>&lt;think&gt;why&lt;/think&gt;so<user>a &lt; b"),
        ("{{ m.content | replace('why', '') }}", "<user>go<assistant><think></think>so<user>a < b"),
    ],
)
def test_what_a_template_makes_of_words_is_its_own(server: Server, content: str, written: str) -> None:
    assert ask(server, turns(content), [USER, SAYS, {"role": "user", "content": "a < b"}]) == written


def test_a_conversation_of_a_known_pattern_is_looked_through(server: Server) -> None:
    """The first has the pattern of the second, and all of it is written."""
    assert ask(server, LAST_FOUR, [USER] * 4) == "<user>go" * 4
    talk = [{"role": "user", "content": f"question {i}"} for i in range(8)]
    error = ask(server, LAST_FOUR, talk)
    assert error["param"] == "messages[0].content"
    assert "does not write" in error["message"]


@pytest.mark.parametrize(
    ("template", "first", "words"),
    [
        (TOOLS_OF_SYSTEM, SYSTEM, None),
        (TOOLS_OF_SYSTEM, USER, "does not begin with a system message"),
        (TOOLS_OR_SYSTEM, USER, None),
        (TOOLS_OR_SYSTEM, SYSTEM, "begins with a system message"),
        (TURNS, SYSTEM, "no place for tools. Give"),
    ],
)
def test_tools_and_a_system_message(server: Server, template: str, first: Any, words: str | None) -> None:
    found = ask(server, template, [first, USER], tools=[TOOL])
    assert "look" in found if words is None else (found["param"] == "tools" and words in found["message"])


@pytest.mark.parametrize(
    ("template", "param", "words"),
    [
        (NEEDS_TOOLS, "tools", "cannot write a conversation without tools"),
        (BROKEN, "messages", "fails on any conversation"),
    ],
)
@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], answered(content="x")])
def test_a_template_that_always_fails_blames_no_message(
    server: Server, template: str, param: str, words: str, messages: list[Any]
) -> None:
    error = ask(server, template, messages)
    assert error["param"] == param
    assert words in error["message"]
    assert "messages[" not in error["message"]


CALL = {"type": "function_call", "call_id": "1", "name": "look", "arguments": '{"at": "sea"}'}
OUTPUT = {"type": "function_call_output", "call_id": "1", "output": "12:00"}
THOUGHT = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]}


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([USER, CALL, OUTPUT], "input[1]"),
        ([USER, THOUGHT, {"role": "assistant", "content": "I look."}, CALL, OUTPUT], "input[3]"),
        ([USER, {**CALL, "name": None}], "input[1]"),
        ([USER, {**OUTPUT, "output": None}], "input[1].output"),
        ([USER, {"role": "user", "content": [{"type": "input_file"}]}], "input[1].content[0]"),
        ([USER, {"role": "user", "content": 3}], "input[1].content"),
        ([{"role": "no role", "content": "x"}], "input[0].role"),
    ],
)
@pytest.mark.parametrize("instructions", [None, "be brief"])
def test_errors_name_the_item(server: Server, items: list[Any], param: str, instructions: str | None) -> None:
    body = {"model": "any", "input": items, "instructions": instructions, "max_output_tokens": 1}
    error = requests.post(server.url + "/v1/responses", json=body, timeout=60).json()["error"]
    assert error["param"] == param
    assert "messages[" not in error["message"]
    assert param in error["message"]
