"""Chat completions through the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.openai.conftest import Server

MODEL = "org/scripted"


def ask(client: OpenAI, content: str = "hello", **fields: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}], **fields)


def test_an_answer(client: OpenAI) -> None:
    answer = ask(client, "hello there")
    (choice,) = answer.choices
    assert choice.message.content == "hello there"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage.prompt_tokens == len("<user>hello there</user>\n<assistant>")
    assert answer.usage.completion_tokens == len("hello there") + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_nullable_fields_are_present(server: Server, client: OpenAI) -> None:
    choice = ask(client).model_dump()["choices"][0]
    assert choice["logprobs"] is None
    assert choice["message"]["refusal"] is None
    assert set(ask(client).choices[0].message.model_fields_set) == {"role", "content", "refusal"}


def test_an_empty_answer_is_a_string(client: OpenAI) -> None:
    assert ask(client, "").choices[0].message.content == ""
    streamed = list(ask(client, "", stream=True))
    assert streamed[0].choices[0].delta.content == ""
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_a_stream(client: OpenAI) -> None:
    chunks = list(ask(client, "hello there", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello there"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_with_usage(client: OpenAI) -> None:
    chunks = list(ask(client, "abc", stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])


BOTH: Any = {"include_usage": True, "continuous_usage_stats": True}


def test_continuous_usage(client: OpenAI) -> None:
    chunks = list(ask(client, "abc", stream=True, stream_options=BOTH))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts[0] == 0  # the role alone
    assert counts[-1] == 4
    assert counts == sorted(counts)
    assert all(chunk.usage.prompt_tokens for chunk in chunks)


def test_continuous_usage_needs_include_usage(client: OpenAI) -> None:
    chunks = list(ask(client, "abc", stream=True, stream_options={"continuous_usage_stats": True}))
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)


def test_several_choices(client: OpenAI) -> None:
    answer = ask(client, "abc", n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 12
    texts = {0: "", 1: "", 2: ""}
    for chunk in ask(client, "abc", n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert set(texts.values()) == {"abc"}


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_length(client: OpenAI, field: str) -> None:
    choice = ask(client, "abcdef", **{field: 3}).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("abc", "length")


@pytest.mark.parametrize("stop", ["d", ["d"], ["", "d"], ["x", "y", "z", "u", "v", "d"]])
def test_stop(client: OpenAI, stop: Any) -> None:
    choice = ask(client, "abcdef", stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.stop_reason) == ("abc", "stop", "d")


@pytest.mark.parametrize("stop", ["", [], None])
def test_no_stop(client: OpenAI, stop: Any) -> None:
    assert ask(client, "abcdef", stop=stop).choices[0].message.content == "abcdef"


def test_logprobs(client: OpenAI) -> None:
    content = ask(client, "aé", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [token.token for token in content] == ["a", "é", ""]
    assert content[1].bytes == list("é".encode())
    assert [top.token for top in content[0].top_logprobs] == ["a", "b"]
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    streamed = [
        token
        for chunk in ask(client, "aé", logprobs=True, top_logprobs=2, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == content


def test_logprobs_without_alternatives(client: OpenAI) -> None:
    assert ask(client, "a", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(client, "a", logprobs=False, extra_body={"top_logprobs": None}).choices[0].logprobs is None


def test_token_ids(client: OpenAI) -> None:
    answer = ask(client, "ab", extra_body={"return_token_ids": True})
    assert answer.choices[0].token_ids == [97, 98, 0]
    assert answer.prompt_token_ids == list(map(ord, "<user>ab</user>\n<assistant>"))


def test_prompt_logprobs(client: OpenAI) -> None:
    scores = ask(client, "ab", extra_body={"prompt_logprobs": 1}).prompt_logprobs
    assert scores[0] is None
    assert scores[1] == {str(ord("u")): {"logprob": -0.25, "rank": 1, "decoded_token": "u"}}


def test_the_final_message_is_continued(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "tail"}, {"role": "assistant", "content": "Head: "}]
    fields = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    answer = client.chat.completions.create(model=MODEL, messages=messages, extra_body=fields)
    assert "".join(map(chr, answer.prompt_token_ids)).endswith("<assistant>Head: ")
    assert answer.choices[0].message.content == "tail"
    echoed = client.chat.completions.create(model=MODEL, messages=messages, extra_body={**fields, "echo": True})
    assert echoed.choices[0].message.content == "Head: tail"


def test_own_answers_are_accepted_back(client: OpenAI) -> None:
    first = ask(client, "one").choices[0].message
    messages: Any = [{"role": "user", "content": "one"}, first, {"role": "user", "content": "two"}]
    assert client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content == "two"


def test_an_alias(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="gpt-3.5-turbo-0613", messages=messages)
    assert answer.choices[0].message.content == "hi"


def test_defaults_of_a_model(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    raw = client.chat.completions.with_raw_response.create(model="merging", messages=messages)
    assert raw.parse().choices[0].message.content == "a\n\nb"
    assert '"temperature":0' in raw.headers["x-troupe-sampling"]
    raw = client.chat.completions.with_raw_response.create(model="merging", messages=messages, temperature=0.5)
    assert '"temperature":0.5' in raw.headers["x-troupe-sampling"]


def test_unknown_fields_are_reported(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a"}]
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=messages, user="me", extra_body={"my_field": 0, "a key": 1}
    )
    assert raw.headers["x-troupe-ignored"] == "my_field,a%20key"


def test_errors_before_and_in_a_stream(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as before:
        ask(client, "[fail out_of_memory]", stream=True)
    assert before.value.status_code == 503
    assert before.value.code == "out_of_memory"
    stream = ask(client, "[wait 0.05][after 3 fail model_error]abcdef", stream=True)
    pieces: list[str] = []
    with pytest.raises(openai.APIError) as during:
        pieces.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(pieces) == "abc"
    assert during.value.code == "model_error"
