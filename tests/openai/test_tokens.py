"""Prompts and token ids as the model would get them."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from tests.openai.conftest import Serve, Server

BASES = ["", "/v1", "/models/org/scripted", "/models/org/scripted/v1"]


def post(server: Server, path: str, **body: Any) -> Any:
    fields = body if path.startswith("/models") else {"model": "org/scripted", **body}
    response = requests.post(server.url + path, json=fields, timeout=10)
    return response.json() if response.status_code == 200 else response


@pytest.mark.parametrize("base", BASES)
def test_what_lm_eval_asks(server: Server, base: str) -> None:
    assert post(server, base + "/tokenize", prompt="test", add_special_tokens=False) == {
        "count": 4,
        "max_model_len": 2000,
        "tokens": list(map(ord, "test")),
    }
    assert post(server, base + "/detokenize", tokens=list(map(ord, "test"))) == {"prompt": "test"}
    named = "" if base.startswith("/models") else "?model=org/scripted"
    info = requests.get(server.url + base + "/tokenizer_info" + named, timeout=10).json()
    assert info["model_max_length"] == 2000
    assert {"eos_token", "bos_token", "pad_token", "chat_template"} <= info.keys()


def test_the_pieces_of_a_text_are_those_of_its_log_probabilities(serve: Serve) -> None:
    server = serve([{"id": "tiny", "loader": "tests.openai.tiny_models:load_model"}])
    fields = {"model": "tiny", "prompt": "é<|im_end|>a", "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    (choice,) = post(server, "/v1/completions", logprobs=0, echo=True, **fields)["choices"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    read = post(server, "/v1/detokenize", model="tiny", tokens=ids, return_pieces=True)
    assert [piece["token"] for piece in read["pieces"]] == choice["logprobs"]["tokens"]
    assert [piece["bytes"] for piece in read["pieces"]][:3] == [[0xC3], [0xA9], list(b"<|im_end|>")]
    assert b"".join(bytes(piece["bytes"]) for piece in read["pieces"]).decode(errors="replace") == read["prompt"]


MESSAGES = [{"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def test_a_chat(server: Server) -> None:
    text = "<system>s</system>\n<user>hi</user>\n<assistant>"
    rendered = post(server, "/v1/chat/completions/render", messages=MESSAGES)
    assert rendered["prompt"] == text
    assert rendered["token_ids"] == list(map(ord, text))
    assert rendered["count"] == len(text)
    assert post(server, "/tokenize", messages=MESSAGES)["tokens"] == rendered["token_ids"]
    asked = post(server, "/v1/chat/completions", messages=MESSAGES, return_token_ids=True, return_prompt_text=True)
    assert (asked["prompt_text"], asked["prompt_token_ids"]) == (text, rendered["token_ids"])


def test_a_chat_left_open(server: Server) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "He"}]
    fields = {"messages": messages, "continue_final_message": True}
    text = "".join(map(chr, post(server, "/tokenize", **fields)["tokens"]))
    assert text.endswith("<assistant>He")
    fields = {"messages": MESSAGES, "add_generation_prompt": False, "chat_template_kwargs": {"a": 1}}
    text = "".join(map(chr, post(server, "/tokenize", **fields)["tokens"]))
    assert text.startswith("<a>1</a>")
    assert text.endswith("</user>\n")


def test_completions(server: Server) -> None:
    data = post(server, "/v1/completions/render", prompt=["ab", [99]])["data"]
    assert [(each["prompt"], each["token_ids"]) for each in data] == [("ab", [97, 98]), (None, [99])]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 7}, "return_token_strs"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
        ("/v1/chat/completions/render", {}, "messages"),
    ],
)
def test_mistakes(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    response = post(server, path, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_strings_of_tokens(server: Server) -> None:
    """A model without a tokenizer: each token's own text."""
    answer = post(server, "/tokenize", prompt="aé", return_token_strs=True)
    assert answer["token_strs"] == ["a", "é"]
    assert "token_strs" not in post(server, "/tokenize", prompt="aé", return_token_strs=False)
    chat = post(server, "/tokenize", messages=MESSAGES, return_token_strs=True)
    assert "".join(chat["token_strs"]) == "<system>s</system>\n<user>hi</user>\n<assistant>"
