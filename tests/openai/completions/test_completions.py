"""Text completions through the official client, and lm_eval's invariants."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.openai.conftest import Serve, Server
from tests.openai.saying import say

MODEL = "org/scripted"
IDS = [ord(character) for character in "tail"]


def ask(client: OpenAI, prompt: Any = "abc", **fields: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt, **fields)


@pytest.fixture(scope="module")
def lenient(server: Server) -> OpenAI:
    """For streams: OpenAI itself sends finish_reason null before the last chunk, which its client's types deny."""
    return server.client(_strict_response_validation=False)


def test_an_answer(client: OpenAI) -> None:
    answer = ask(client, "once upon a time there was")
    assert answer.choices[0].text == "once upon a time"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    assert answer.object == "text_completion"
    assert answer.choices[0].model_fields_set >= {"logprobs"}


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        (IDS, ["tail"]),
        ([IDS], ["tail"]),
        ([IDS, [97]], ["tail", "a"]),
        (["abc", IDS], ["abc", "tail"]),
    ],
)
def test_prompts(client: OpenAI, lenient: OpenAI, prompt: Any, texts: list[str]) -> None:
    answer = ask(client, prompt)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    streamed = [""] * len(texts)
    for chunk in ask(lenient, prompt, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_choices_are_ordered_by_prompt(client: OpenAI) -> None:
    answer = ask(client, ["a", "b"], n=2)
    assert [choice.text for choice in answer.choices] == ["a", "a", "b", "b"]
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 8


def test_echo(client: OpenAI, lenient: OpenAI) -> None:
    assert ask(client, "abc", echo=True).choices[0].text == "abcabc"
    assert ask(client, IDS, echo=True, max_tokens=1).choices[0].text == "tailt"
    assert ask(client, IDS, echo=True, max_tokens=0).choices[0].text == "tail"
    assert "".join(chunk.choices[0].text for chunk in ask(lenient, "abc", echo=True, stream=True)) == "abcabc"


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(server: Server, max_tokens: int, stream: bool) -> None:
    client = server.client(_strict_response_validation=False)  # OpenAI's own echo form has nulls its types deny
    given = ask(client, [IDS, [97]], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1, stream=stream)
    lists: dict[int, dict[str, list[Any]]] = {0: {}, 1: {}}
    for part in given if stream else [given]:
        for choice in part.choices:
            for name, values in choice.logprobs.model_dump().items():
                lists[choice.index].setdefault(name, []).extend(values)
    for index, length in ((0, 4), (1, 1)):
        generated = min(max_tokens, length + 1)
        assert {len(values) for values in lists[index].values()} == {length + generated}
        assert lists[index]["token_logprobs"][0] is None
        assert lists[index]["top_logprobs"][0] is None
        for own, top in list(zip(lists[index]["token_logprobs"], lists[index]["top_logprobs"], strict=True))[1:]:
            assert own == max(top.values())
    assert lists[0]["tokens"][:4] == list("tail")
    assert lists[0]["text_offset"][:4] == [0, 1, 2, 3]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_offsets_are_those_of_the_text(serve: Serve, echo: bool, as_ids: bool) -> None:
    client = serve([{"id": "bytes", "loader": "tests.openai.saying:load_model"}]).client(
        timeout=60, _strict_response_validation=False
    )
    extra = {"return_tokens_as_token_ids": as_ids, "skip_special_tokens": False}
    text = "aé日😀b"
    fields: Any = {
        "model": "bytes",
        "prompt": say(text),
        "logprobs": 0,
        "temperature": 0,
        "max_tokens": 30,
        "echo": echo,
    }
    whole = client.completions.create(**fields, extra_body=extra).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**fields, extra_body=extra, stream=True)]
    offsets = whole.logprobs.text_offset
    assert [offset for chunk in chunks for offset in chunk.logprobs.text_offset] == offsets
    # One token a byte: the tokens of a character begin where it does.
    said = [character for character in text for _ in character.encode()]
    assert [whole.text[offset] for offset in offsets[-len(said) - 1 : -1]] == said
    assert offsets[-1] == len(whole.text)


def test_logprobs_without_echo(client: OpenAI) -> None:
    logprobs = ask(client, "aé", logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["a", "é", ""]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs[0] == {"a": -0.25, "b": -0.5}


def test_the_chosen_token_is_always_reported(client: OpenAI) -> None:
    logprobs = ask(client, "a", logprobs=0).choices[0].logprobs
    assert logprobs.token_logprobs == [-0.25, -0.25]
    assert logprobs.top_logprobs == [{"a": -0.25}, {"": -0.25}]


def test_tokens_as_ids(client: OpenAI) -> None:
    fields = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = ask(client, "a", logprobs=1, extra_body=fields).choices[0]
    assert choice.logprobs.tokens == ["token_id:97", "token_id:0"]
    assert (choice.token_ids, choice.prompt_token_ids) == ([97, 0], [97])


def test_best_of(client: OpenAI) -> None:
    answer = ask(client, "abc", best_of=3)
    assert [choice.text for choice in answer.choices] == ["abc"]
    assert answer.usage.completion_tokens == 12
    with pytest.raises(openai.BadRequestError, match="stream") as error:
        ask(client, "abc", best_of=3, stream=True)
    assert error.value.param == "best_of"


def test_a_stream_with_usage(lenient: OpenAI) -> None:
    chunks = list(ask(lenient, "abc", stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert chunks[-2].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("prompt", [[], "", [[]], [1.5], [-1], [2**40], [True], {"a": 1}, [["a"]], [[97], 1]])
def test_prompts_that_are_none(client: OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, prompt)
    assert error.value.param == "prompt"
