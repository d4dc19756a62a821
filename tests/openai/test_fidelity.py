"""A prompt is exactly what the model's own template and encoder give, whatever the template."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from tests.openai.conftest import Serve, Server
from tests.openai.templates import TEMPLATES
from tests.tiny import byte_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "a \\"b\\""}'}}
PARSED = {**CALL, "function": {"name": "look", "arguments": {"at": 'a "b"'}}}

# What a client sends, and what the template is to get where that differs.
CONVERSATIONS: dict[str, tuple[list[Any], list[Any] | None]] = {
    "one turn": ([{"role": "user", "content": "Hi, Zoë <|im_end|> \n"}], None),
    "turns": (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>x</think> b "},
            {"role": "user", "content": ""},
        ],
        None,
    ),
    "system": ([{"role": "system", "content": " be kind "}, {"role": "user", "content": "{{ 1 }}"}], None),
    "mapped": (
        [{"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
    ),
    "tools": (
        [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "tool", "content": "seen", "tool_call_id": "call_1"},
        ],
        [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", "tool_calls": [PARSED]},
            {"role": "tool", "content": "seen", "tool_call_id": "call_1"},
        ],
    ),
    "reasoning": (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "hm"},
            {"role": "user", "content": "c"},
        ],
        None,
    ),
}


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    loader = "tests.openai.templates:load_template"
    engine = {"pack_linears": False, "threads": 1}
    return serve([{"id": style, "loader": loader, "kwargs": {"style": style}, "engine": engine} for style in TEMPLATES])


def as_parts(messages: list[Any]) -> list[Any]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def directly(tokenizer: Any, messages: list[Any], **arguments: Any) -> Any:
    """What the template itself gives: a text, or its refusal."""
    try:
        return tokenizer.apply_chat_template(messages, **arguments)
    except Exception as refusal:
        return refusal


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts(server: Server, style: str, name: str) -> None:
    sent, meant = CONVERSATIONS[name]
    meant = meant or sent
    if style == "parts":
        meant = as_parts(meant)
    tokenizer = byte_tokenizer()
    body: dict[str, Any] = {"model": style, "messages": sent, "chat_template_kwargs": {"enable_thinking": False}}
    arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    if name == "tools" and "tools" in TEMPLATES[style]:
        body["tools"] = arguments["tools"] = TOOLS
    response = requests.post(server.url + "/v1/chat/completions/render", json=body, timeout=60)
    text = directly(tokenizer, meant, chat_template=TEMPLATES[style], **arguments)
    if isinstance(text, Exception):
        assert response.status_code == 400
        assert str(text) in response.json()["error"]["message"]
        return
    assert response.json()["prompt"] == text
    assert response.json()["token_ids"] == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("style", ["llama3", "chatml"])
def test_the_beginning_of_a_text_is_written_once(server: Server, style: str) -> None:
    tokenizer = byte_tokenizer()
    plain = requests.post(server.url + "/tokenize", json={"model": style, "prompt": "a"}, timeout=60).json()["tokens"]
    assert plain == tokenizer("a").input_ids
    text = tokenizer.bos_token + "a"
    again = requests.post(server.url + "/tokenize", json={"model": style, "prompt": text}, timeout=60).json()["tokens"]
    assert again.count(tokenizer.bos_token_id) == 1
