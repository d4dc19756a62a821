"""What a checkpoint's generation_config does to answers, against the model's own `generate`."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import requests
import torch

from deployments.local import LocalServer, start
from tests.tiny import byte_tokenizer, llama

PROMPTS = [list(b"once upon"), list(b"a"), list(b"The quick brown fox")]
KINDS = ["continuous_batching", "generate"]


def generated(prompt: list[int], settings: dict[str, Any], **kwargs: Any) -> list[int]:
    """What a fresh model generates greedily."""
    model, ids = llama(), torch.tensor([prompt])
    model.generation_config.update(**settings)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": 16, "do_sample": False, **kwargs}
    )
    return list(found[0].tolist()[len(prompt) :])


def serve(kind: str, **settings: Any) -> LocalServer:
    model = llama()
    model.generation_config.update(**settings)
    return start(model=model, tokenizer=byte_tokenizer(), engine={"kind": kind, "threads": 1, "memory_gib": 1})


def ask(server: LocalServer, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = {"model": "model", "prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True, **fields}
    answer = requests.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def format_rules() -> dict[str, Any]:
    """Rules that change the text of every prompt: tokens, and words of one to three tokens in what is left then."""
    free = [generated(prompt, {}) for prompt in PROMPTS]
    rules: dict[str, Any] = {"suppress_tokens": [free[1][0]], "begin_suppress_tokens": [free[0][0]]}
    left = [generated(prompt, rules) for prompt in PROMPTS]
    words = [left[0][2:4], left[1][3:6], [PROMPTS[2][-1], left[2][0]]]
    settings = {**rules, "bad_words_ids": words}
    assert all(generated(prompt, settings) != text for prompt, text in zip(PROMPTS, left, strict=True))
    return {**rules, "bad_words_ids": [*words, [left[0][12]]]}


@pytest.mark.parametrize("kind", KINDS)
def test_words_and_tokens_that_a_format_rules_out_are_not_written(kind: str) -> None:
    rules = format_rules()
    expected = [generated(prompt, rules) for prompt in PROMPTS]
    with serve(kind, **rules) as server, ThreadPoolExecutor(len(PROMPTS)) as clients:
        assert [answer["token_ids"] for answer in clients.map(partial(ask, server), PROMPTS)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_nor_are_they_found_by_a_beam_search(kind: str) -> None:
    rules = {**format_rules(), "forced_bos_token_id": 7}
    with serve(kind, **rules) as server:
        for prompt in PROMPTS:
            expected = generated(prompt, rules, num_beams=3)
            assert ask(server, prompt, n=3, use_beam_search=True)["token_ids"] == expected


def test_what_a_checkpoint_sets_and_no_request_gets_is_named(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "num_beams": 1}
    with caplog.at_level(logging.WARNING), serve("auto", temperature=0.5, **settings) as server:
        assert ask(server, PROMPTS[0])["token_ids"] == generated(PROMPTS[0], {})
    (message,) = [record.getMessage() for record in caplog.records if "generation_config" in record.getMessage()]
    assert "repetition_penalty=1.3, min_new_tokens=4 and no_repeat_ngram_size=2, which is not applied" in message
    assert "Send repetition_penalty and min_tokens, or set models[].api.default_params." in message
    assert message.endswith("For no_repeat_ngram_size, set generate_kwargs in a loader.")


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_are_none(kind: str) -> None:
    with serve(kind) as server:
        answer = ask(server, PROMPTS[0], max_tokens=0, echo=True, logprobs=1)
    assert (answer["token_ids"], answer["text"]) == ([], byte_tokenizer().decode(PROMPTS[0]))
    assert len(answer["logprobs"]["token_logprobs"]) == len(PROMPTS[0])
