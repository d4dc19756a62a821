"""-1: log-probabilities of all tokens, where the server has no limit."""

from __future__ import annotations

import math
import pickle
import random
import struct
from typing import Any

import pytest
import requests
import torch
from openai import OpenAI

from deployments.core.events import Delta
from deployments.core.logprobs import TokenLogprob, TokenTexts, WholeVocabulary
from tests.openai.conftest import Serve, Server
from tests.tiny import byte_tokenizer, llama

LOADER = "tests.openai.tiny_models:load_model"
WIDTH = 261
PROMPT = list(b"hello")
KINDS = ["auto", "generate"]


@pytest.fixture(scope="module")
def open_server(serve: Serve) -> Server:
    engine = {"pack_linears": False, "threads": 1}
    models = [{"id": kind, "loader": LOADER, "engine": {**engine, "kind": kind}} for kind in KINDS]
    return serve(models, max_logprobs=-1)


@pytest.fixture(scope="module")
def client(open_server: Server) -> OpenAI:
    return open_server.client(timeout=60)


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    answer = requests.post(server.url + path, json={"temperature": 0, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def expected(ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every position's next token."""
    with torch.inference_mode():
        logits = llama(max_position_embeddings=1024)(torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion(open_server: Server, kind: str) -> None:
    fields = {
        "model": kind,
        "prompt": PROMPT,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "max_tokens": 3,
    }
    choice = post(open_server, "/v1/completions", **fields, logprobs=-1)["choices"][0]
    reference = expected(PROMPT + choice["token_ids"])
    for place, top in enumerate(choice["logprobs"]["top_logprobs"]):
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert set(top) == {f"token_id:{i}" for i in range(WIDTH)}
        row = reference[len(PROMPT) - 1 + place]
        assert [top[f"token_id:{i}"] for i in range(WIDTH)] == pytest.approx(row.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt(open_server: Server, kind: str) -> None:
    choice = post(open_server, "/v1/completions", model=kind, prompt=PROMPT, prompt_logprobs=-1)["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    reference = expected(PROMPT)
    for place, entries in enumerate(rest):
        assert [entries[str(i)]["logprob"] for i in range(WIDTH)] == pytest.approx(reference[place].tolist(), abs=1e-4)
        assert {entry["rank"] for entry in entries.values()} <= set(range(1, WIDTH + 1))
        assert next(iter(entries)) == str(PROMPT[place + 1])


def test_a_chat_and_its_stream(client: OpenAI) -> None:
    fields: Any = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    fields |= {"logprobs": True, "top_logprobs": -1}
    whole = client.chat.completions.create(**fields).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    for token in whole.content:
        assert math.fsum(math.exp(top.logprob) for top in token.top_logprobs) == pytest.approx(1, abs=1e-4)
        assert len(token.top_logprobs) == WIDTH
        assert token.top_logprobs[0].token == token.token
        assert {bytes(top.bytes or ()) for top in token.top_logprobs} >= {bytes([byte]) for byte in range(256)}
    streamed = []
    for chunk in client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed += (choice.logprobs.content or []) if choice.logprobs else []
    assert [token.token for token in streamed] == [token.token for token in whole.content]
    for ours, theirs in zip(streamed, whole.content, strict=True):
        assert len(ours.top_logprobs) == WIDTH
        assert ours.top_logprobs[0].logprob == pytest.approx(theirs.top_logprobs[0].logprob, abs=1e-4)


def test_the_responses_api(open_server: Server) -> None:
    answer = post(open_server, "/v1/responses", model="auto", input="hi", max_output_tokens=2, top_logprobs=-1)
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert [len(token["top_logprobs"]) for token in logprobs] == [WIDTH, WIDTH]


def test_echo_reports_all_of_the_prompt(open_server: Server) -> None:
    fields = {"model": "auto", "prompt": PROMPT, "max_tokens": 0, "echo": True}
    top = post(open_server, "/v1/completions", **fields, logprobs=-1)["choices"][0]["logprobs"]["top_logprobs"]
    assert [each if each is None else len(each) for each in top] == [None, *[WIDTH] * 4]


def test_neighbors_get_what_they_ask_for(open_server: Server) -> None:
    body = {"model": "auto", "prompt": [PROMPT] * 4, "logprobs": 2}
    choices = post(open_server, "/v1/completions", **body)["choices"]
    assert {len(top) for choice in choices for top in choice["logprobs"]["top_logprobs"]} <= {2, 3}


def test_named_tokens_go_first(open_server: Server) -> None:
    body = {"model": "auto", "prompt": PROMPT, "logprobs": -1, "logprob_token_ids": [97, 98]}
    body["return_tokens_as_token_ids"] = True
    top = post(open_server, "/v1/completions", **body)["choices"][0]["logprobs"]["top_logprobs"]
    assert {"token_id:97", "token_id:98"} <= set(top[0])
    assert len(top[0]) <= 3


def test_no_limit_is_no_limit(open_server: Server) -> None:
    body = {"model": "auto", "prompt": PROMPT, "logprobs": 200}
    top = post(open_server, "/v1/completions", **body)["choices"][0]["logprobs"]["top_logprobs"]
    assert len(top[0]) in (200, 201)


@pytest.mark.parametrize("limit", [0, 20, 1000])
def test_a_limit_forbids_it(serve: Serve, limit: int) -> None:
    server = serve([{"id": "m", "loader": "tests.openai.scripted:load_model"}], max_logprobs=limit)
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True}
    for path, body, param in (
        ("/v1/chat/completions", {**chat, "top_logprobs": -1}, "top_logprobs"),
        ("/v1/completions", {"prompt": "x", "logprobs": -1}, "logprobs"),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "x", "logprobs": -2}, "logprobs"),
    ):
        answer = requests.post(server.url + path, json={"model": "m", **body}, timeout=10)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_a_large_vocabulary_crosses_in_four_bytes_a_token() -> None:
    chance, size = random.Random(0), 128_000
    texts = TokenTexts(tuple(f"token{i}" for i in range(size)), tuple(b"token%d" % i for i in range(size)))
    values = struct.pack(f"{size}f", *(chance.random() - 20 for _ in range(size)))
    entries = tuple(TokenLogprob(1, "a", b"a", -1.0, 1, WholeVocabulary(texts, values)) for _ in range(8))
    data = pickle.dumps(Delta(logprobs=entries[:1], text="a"))
    # The texts cross once with a message; each further position adds its numbers, or less if they are the same object.
    other = pickle.dumps(Delta(logprobs=(*entries[:1], TokenLogprob(1, "a", b"a", 0.0, 1, _other(texts, values)))))
    assert len(other) - len(data) < 4 * size + 1000
    copy = pickle.loads(data).logprobs[0].top
    assert len(copy) == size
    best = copy[0]
    assert best.logprob == max(candidate.logprob for candidate in copy)
    assert (best.token, best.bytes) == (f"token{best.token_id}", b"token%d" % best.token_id)


def _other(texts: TokenTexts, values: bytes) -> WholeVocabulary:
    return WholeVocabulary(texts, bytes(reversed(values)))


def test_tokens_of_probability_0_are_left_out() -> None:
    values = struct.pack("3f", -1.0, float("-inf"), -0.5)
    top = WholeVocabulary(TokenTexts(("a", "b", "c"), (b"a", b"b", b"c")), values)
    assert [candidate.token for candidate in top] == ["c", "a"]
    assert len(top) == 2


def test_the_texts_of_a_tokenizer(open_server: Server) -> None:
    tokenizer = byte_tokenizer()
    answer = requests.post(
        f"{open_server.url}/tokenize", json={"model": "auto", "prompt": "a é", "return_token_strs": True}, timeout=10
    ).json()
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert len(answer["token_strs"]) == answer["count"]
