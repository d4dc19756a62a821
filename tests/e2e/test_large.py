"""Requests and answers above the few megabytes that Ray Serve sends in one message by itself."""

from __future__ import annotations

import asyncio

import pytest
import requests

from tests.faults.clients import KEY, ask

WORD = "x" * 6_000_000
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def url(two_replicas: str) -> str:
    return two_replicas


@pytest.mark.parametrize("stream", [True, False])
def test_long_messages_and_long_answers(url: str, stream: bool) -> None:
    reply = asyncio.run(ask(url, "a", WORD, max_tokens=2, stream=stream))
    assert reply.text == f"{WORD} 0 {WORD} 1 "


def test_many_long_answers(url: str) -> None:
    body = {"model": "a", "messages": [{"role": "user", "content": WORD[:1_500_000]}], "max_tokens": 1, "n": 8}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, headers=AUTHORIZED, timeout=120)
    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert texts == [f"{WORD[:1_500_000]} 0 "] * 8


@pytest.mark.parametrize(
    "more",
    [
        {"chat_template_kwargs": {"note": WORD}},
        {"documents": [{"title": "t", "text": WORD}]},
        {"allowed_token_ids": list(range(100, 1_000_000))},
        {"stop": ["s" * 10_000 + str(i) for i in range(1000)]},
        {"bad_words": ["b" * 10_000 + str(i) for i in range(1000)]},
        {"logit_bias": {str(i): 0.123456789012 for i in range(290_000)}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_long_fields(url: str, more: dict[str, object]) -> None:
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **more}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, headers=AUTHORIZED, timeout=120)
    assert answer.status_code == 200, answer.text[:1000]
    assert answer.json()["choices"][0]["message"]["content"] == "hi 0 "
