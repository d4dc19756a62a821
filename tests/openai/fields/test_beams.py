"""Beam search as vLLM's clients ask for it: `n` is the width, and all texts are answers."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import torch
from openai import OpenAI
from transformers import LlamaForCausalLM

from tests.openai.conftest import Serve, Server
from tests.tiny import byte_tokenizer, llama

LOADER = "tests.openai.tiny_models:load_model"
PROMPT = list(b"once upon")


@pytest.fixture(scope="module")
def beams(serve: Serve) -> Server:
    engine = {"pack_linears": False, "threads": 1}
    kinds = {"generate": {"kind": "generate"}, "batching": {}, "fixed": {"deterministic": True}}
    return serve([{"id": id, "loader": LOADER, "engine": {**engine, **kind}} for id, kind in kinds.items()])


@pytest.fixture(params=["batching", "generate"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def client(beams: Server) -> OpenAI:
    return beams.client(timeout=60)


def ask(client: OpenAI, **fields: Any) -> list[list[int]]:
    extra = {"use_beam_search": True, "return_token_ids": True, **fields.pop("extra", {})}
    fields = {"model": "generate", "max_tokens": 8, **fields}
    answer = client.completions.create(prompt=PROMPT, extra_body=extra, **fields)
    assert [choice.index for choice in answer.choices] == list(range(fields["n"]))
    return [choice.token_ids for choice in answer.choices]  # type: ignore[attr-defined]


def expected(width: int, **settings: Any) -> list[list[int]]:
    ids = torch.tensor([byte_tokenizer().encode(bytes(PROMPT).decode(), add_special_tokens=False)])
    assert len(ids[0]) == len(PROMPT)
    model = llama(max_position_embeddings=1024)
    found = model.generate(
        torch.tensor([PROMPT]),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=8,
        do_sample=False,
        **settings,
    )
    return [row[len(PROMPT) :] for row in found.tolist()]


@pytest.mark.parametrize("width", [2, 3, 5])
def test_the_texts_are_those_of_generate_best_first(client: OpenAI, model: str, width: int) -> None:
    texts = ask(client, model=model, n=width)
    assert texts == expected(width)
    assert len({tuple(text) for text in texts}) == width


@pytest.mark.parametrize(
    "settings",
    [{"length_penalty": -2.0}, {"length_penalty": 3.0}, {"early_stopping": True}, {"early_stopping": "never"}],
)
def test_settings_of_the_search(client: OpenAI, model: str, settings: dict[str, Any]) -> None:
    # A frequent terminator, so that the texts have different lengths.
    common = expected(4)[0][2]
    found = ask(client, model=model, n=4, extra={**settings, "stop_token_ids": [common]})
    same = expected(4, eos_token_id=[257, common], pad_token_id=258, **settings)
    assert found == [text[: text.index(common) + 1] if common in text else text for text in same]


def test_a_width_of_one_is_greedy(client: OpenAI) -> None:
    assert ask(client, n=1) == expected(1)


def test_fewer_answers_than_beams(client: OpenAI, model: str) -> None:
    extra = {"num_beams": 4, "use_beam_search": False}
    assert ask(client, model=model, n=2, extra=extra) == expected(4)[:2]


def test_a_chat(client: OpenAI, model: str) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    fields: Any = {"model": model, "messages": messages, "n": 3, "max_tokens": 6}
    fields["extra_body"] = {"use_beam_search": True}
    answer = client.chat.completions.create(**fields)
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [choice.message.content for choice in answer.choices]
    assert answer.usage is not None
    assert 3 <= answer.usage.completion_tokens <= 18


def test_all_answers_are_of_one_search(client: OpenAI, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = LlamaForCausalLM.forward, []

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    ask(client, model=model, n=2)  # the first search finds out how the model's generate is called
    calls.clear()
    assert len(ask(client, model=model, n=4, max_tokens=7)) == 4
    assert 0 < len(calls) <= 7


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "fixed", "n": 2, "use_beam_search": True}, "use_beam_search"),
        ({"model": "fixed", "n": 1, "num_beams": 3}, "num_beams"),
        ({"model": "batching", "n": 2, "use_beam_search": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"model": "batching", "n": 2, "use_beam_search": True, "top_p": 0.5}, "top_p"),
        ({"n": 65, "use_beam_search": True}, "n"),
        ({"n": 3, "num_beams": 2}, "n"),
        ({"n": 2, "use_beam_search": True, "top_p": 0.5}, "top_p"),
        ({"n": 2, "use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"n": 2, "use_beam_search": True, "best_of": 3}, "best_of"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"early_stopping": "sometimes", "use_beam_search": True}, "early_stopping"),
        ({"use_beam_search": "maybe"}, "use_beam_search"),
    ],
)
def test_what_is_refused(beams: Server, fields: dict[str, Any], param: str) -> None:
    body = {"model": "generate", "prompt": "abc", "max_tokens": 2, **fields}
    answer = requests.post(f"{beams.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert param in error["message"]


@pytest.mark.parametrize("fields", [{"use_beam_search": False}, {"length_penalty": 1}, {"early_stopping": False}])
def test_what_asks_for_nothing(beams: Server, fields: dict[str, Any]) -> None:
    body = {"model": "batching", "prompt": "abc", "max_tokens": 2, **fields}
    assert requests.post(f"{beams.url}/v1/completions", json=body, timeout=30).status_code == 200


def test_searches_and_other_texts_do_not_change_each_other(client: OpenAI) -> None:
    fields: Any = {"model": "batching", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    fields["extra_body"] = {"return_token_ids": True, "ignore_eos": True}
    alone = client.completions.create(**fields).choices[0].token_ids  # type: ignore[attr-defined]
    with ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(client.completions.create, **fields) for _ in range(4)]
        searches = [pool.submit(ask, client, model="batching", n=3) for _ in range(4)]
        assert [search.result() for search in searches] == [expected(3)] * 4
        assert [text.result().choices[0].token_ids for text in texts] == [alone] * 4  # type: ignore[attr-defined]


def test_a_client_that_leaves_ends_its_search(beams: Server, client: OpenAI) -> None:
    body = {
        "model": "batching",
        "prompt": "abc",
        "n": 8,
        "use_beam_search": True,
        "max_tokens": 900,
        "ignore_eos": True,
    }
    with pytest.raises(requests.Timeout):
        requests.post(f"{beams.url}/v1/completions", json=body, timeout=0.3)
    assert ask(client, model="batching", n=2) == expected(2)
