"""A prompt is exactly what the model's own template and encoder give, whatever the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests
from transformers import AutoTokenizer, FuyuProcessor, PaliGemmaProcessor

from deployments.cli.endpoint.processes import free_port
from model_loaders.demo import WEIGHTS
from model_loaders.examples.fuyu import cut_tensors
from tests.model_loaders.backends.test_ctranslate2 import converted
from tests.openai.conftest import Serve, Server
from tests.openai.templates import TEMPLATES
from tests.seeds.vision import data_uri, picture, save_fuyu, save_paligemma
from tests.tiny import byte_tokenizer, llama

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
    if name == "tools" and "tool_calls" not in TEMPLATES[style] and style != "strict":
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages[1].tool_calls[0]")
        return
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


CHAT = [
    {"role": "user", "content": "Hi, Zoe <|im_end|> \n"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "{{ 1 }}"},
]
LOADERS = ("demo", "auto", "fuyu", "paligemma", "ctranslate2", "triton")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for every loader; `lender` has the chat template that PaliGemma borrows."""
    root = tmp_path_factory.mktemp("loaders")
    model, tokenizer = llama(), byte_tokenizer()
    tokenizer.chat_template = TEMPLATES["llama3"]
    tokenizer.save_pretrained(root / "lender")
    model.save_pretrained(root / "auto")
    tokenizer.save_pretrained(root / "auto")
    return {
        "demo": WEIGHTS,
        "auto": root / "auto",
        "fuyu": save_fuyu(root / "fuyu"),
        "paligemma": save_paligemma(root / "paligemma"),
        "ctranslate2": converted(root, model, tokenizer),
        "triton": root / "lender",
        "lender": root / "lender",
    }


@pytest.fixture(scope="module")
def loaders(serve: Serve, checkpoints: dict[str, Path]) -> Server:
    """Every loader we ship; no Triton server answers, since prompts are written on our side."""
    kwargs = {
        "demo": {},
        "auto": {"model_name": str(checkpoints["auto"])},
        "fuyu": {"model_name": str(checkpoints["fuyu"])},
        "paligemma": {"model_name": str(checkpoints["paligemma"]), "template_from": str(checkpoints["lender"])},
        "ctranslate2": {"model_path": str(checkpoints["ctranslate2"])},
        "triton": {"server_url": f"127.0.0.1:{free_port()}", "tokenizer_name": str(checkpoints["triton"])},
    }
    folder = {"fuyu": "examples.", "paligemma": "examples.", "ctranslate2": "backends.", "triton": "backends."}
    names = {i: f"model_loaders.{folder.get(i, '')}{i}:load_model" for i in LOADERS}
    return serve([{"id": i, "loader": names[i], "kwargs": kwargs[i]} for i in LOADERS])


def prompt_of(server: Server, loader: str, messages: list[Any]) -> tuple[str, list[int]]:
    body = {"model": loader, "messages": messages}
    answer = requests.post(f"{server.url}/v1/chat/completions/render", json=body, timeout=120).json()
    return answer["prompt"], answer["token_ids"]


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loaders_prompts(loaders: Server, checkpoints: dict[str, Path], loader: str) -> None:
    prompt, token_ids = prompt_of(loaders, loader, CHAT)
    if loader == "fuyu":
        tokenizer = FuyuProcessor.from_pretrained(checkpoints[loader]).tokenizer
        assert prompt == "".join(f"{message['content']}\n" for message in CHAT)
        assert token_ids == tokenizer(f"<s>{prompt}<0x04>", add_special_tokens=False).input_ids
        return
    owner = "lender" if loader in ("paligemma", "triton", "ctranslate2") else loader
    template = AutoTokenizer.from_pretrained(checkpoints[owner]).chat_template
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["auto" if loader == "ctranslate2" else loader])
    directly = {"chat_template": template, "add_generation_prompt": True}
    assert prompt == tokenizer.apply_chat_template(CHAT, tokenize=False, **directly)
    assert token_ids == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, **directly)["input_ids"]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("loader", ["fuyu", "paligemma"])
def test_prompts_with_an_image(loaders: Server, checkpoints: dict[str, Path], loader: str) -> None:
    image = {"type": "image_url", "image_url": {"url": data_uri(picture())}}
    message = {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}
    prompt, token_ids = prompt_of(loaders, loader, [message])
    processor: Any
    if loader == "fuyu":
        processor = FuyuProcessor.from_pretrained(checkpoints[loader])
        cut_tensors(processor.image_processor)
        text, more = "What is it?\n", {"return_legacy_image_output": False}
    else:
        processor = PaliGemmaProcessor.from_pretrained(checkpoints[loader])
        lender = AutoTokenizer.from_pretrained(checkpoints["lender"])
        flat = [{"role": "user", "content": "What is it?"}]
        text = lender.apply_chat_template(flat, tokenize=False, add_generation_prompt=True)
        assert prompt == text
        text, more = "<image>" + text.removeprefix(lender.bos_token), {}
    assert token_ids == processor(text=text, images=picture(), return_tensors="pt", **more)["input_ids"][0].tolist()
