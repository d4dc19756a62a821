"""The context of an encoder-decoder: its prompt takes no positions of the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import torch

from deployments.local import LocalServer, start
from tests.tiny import bart, byte_tokenizer

LENGTH = 256


@pytest.fixture(scope="module", params=["continuous_batching", "generate"])
def server(request: pytest.FixtureRequest) -> Iterator[LocalServer]:
    engine = {"kind": request.param, "threads": 1, "memory_gib": 1}
    with start(model=bart(), tokenizer=byte_tokenizer(), engine=engine, plain_chat=True) as server:
        yield server


def prompt(length: int) -> list[int]:
    return [(7 * i) % 250 for i in range(length)]


def post(server: LocalServer, ids: list[int], **fields: Any) -> requests.Response:
    body = {"model": "model", "prompt": ids, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}
    return requests.post(f"{server.url}/v1/completions", json=body, timeout=60)


@pytest.mark.parametrize(("length", "tokens"), [(LENGTH, 20), (LENGTH - 1, 20), (9, LENGTH)])
def test_prompt_and_answer_have_the_whole_context_each(server: LocalServer, length: int, tokens: int) -> None:
    model, ids = bart(), prompt(length)
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, 1:].tolist()
    answer = post(server, ids, max_tokens=tokens)
    assert answer.status_code == 200, answer.text
    assert (len(expected), answer.json()["choices"][0]["token_ids"]) == (tokens, expected)


def test_more_than_that_ends_at_the_context(server: LocalServer) -> None:
    answer = post(server, prompt(100), max_tokens=LENGTH + 40).json()
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (LENGTH, "length")


def test_a_longer_prompt_is_refused_or_cut(server: LocalServer) -> None:
    assert post(server, prompt(LENGTH + 1)).json()["error"]["code"] == "context_length_exceeded"
    answer = post(server, prompt(LENGTH + 1), truncate_prompt_tokens=-1, max_tokens=20).json()
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (LENGTH, 20)
