"""A model that was loaded anew from a changed folder: its tokenizer's facts are those of the new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import requests
from tokenizers import Tokenizer, decoders

from tests.openai.conftest import Serve, Server
from tests.openai.tiny_models import TOOLS_TEMPLATE
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer, llama

TOOL = {"type": "function", "function": {"name": "save", "parameters": {"type": "object", "properties": {}}}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def write(folder: Path, template: str) -> None:
    llama(max_position_embeddings=2048).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture
def reloading(tmp_path: Path, serve: Serve) -> Server:
    write(tmp_path, CHAT_TEMPLATE)
    kwargs = {"model_name": str(tmp_path)}
    engine = {"pack_linears": False, "threads": 1}
    entry = {"id": "a", "loader": "model_loaders.auto:load_model", "kwargs": kwargs, "engine": engine}
    return serve([entry], admin_keys=["key"])


def ask(server: Server, path: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(server.url + path, json=body, headers={"Authorization": "Bearer key"}, timeout=60)


def reload(server: Server) -> None:
    assert ask(server, "/admin/unload", {"model": "a"}).status_code == 200


def test_a_template_that_has_a_place_for_tools_now(reloading: Server, tmp_path: Path) -> None:
    refused = ask(reloading, "/v1/chat/completions", {**CHAT, "tools": [TOOL]})
    assert refused.status_code == 400
    assert ask(reloading, "/v1/chat/completions", CHAT).status_code == 200
    write(tmp_path, TOOLS_TEMPLATE)
    reload(reloading)
    assert ask(reloading, "/v1/chat/completions", {**CHAT, "tools": [TOOL]}).status_code == 200
    info = requests.get(reloading.url + "/tokenizer_info", headers={"Authorization": "Bearer key"}, timeout=60).json()
    assert info["chat_template"] == TOOLS_TEMPLATE


def test_the_first_tokens_text_is_the_new_tokenizers(reloading: Server, tmp_path: Path) -> None:
    body = {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 0}
    assert ask(reloading, "/v1/completions", body).json()["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    file = tmp_path / "tokenizer.json"
    backend = Tokenizer.from_str(file.read_text())
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "A")])
    file.write_text(json.dumps(json.loads(backend.to_str())))
    reload(reloading)
    assert ask(reloading, "/v1/completions", body).json()["choices"][0]["logprobs"]["tokens"][0] == "A"
