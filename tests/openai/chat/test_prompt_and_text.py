"""The text of a completion is what the new tokens add to the decoded prompt, on both engines."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from tests.openai.conftest import Serve
from tests.openai.saying import say, sentencepiece

LOADER = "tests.openai.saying:load_model"
ENGINES = ("continuous_batching", "generate")
TEXTS = ["    return x", " Paris, the", "Paris", " é日 the", "\n    x", "  "]


@pytest.fixture(scope="module")
def client(serve: Serve) -> OpenAI:
    def model(engine: str) -> dict[str, Any]:
        options = {"kind": engine, "pack_linears": False, "threads": 1}
        return {"id": engine, "loader": LOADER, "kwargs": {"kind": "sentencepiece"}, "engine": options}

    return serve([model(engine) for engine in ENGINES]).client(timeout=60, _strict_response_validation=False)


def prompt_of(text: str) -> str:
    """A prompt after which the model says the text: its first space is a token's, as everywhere but at a beginning."""
    return f"The capital is{say(text)}"


def expected(prompt: str) -> str:
    """What the new tokens add to the prompt, by the tokenizer itself."""
    tokenizer = sentencepiece()
    tokenizer.add_tokens(["<|say|>", "<|said|>"], special_tokens=True)
    ids = tokenizer(prompt)["input_ids"]
    first, last = (tokenizer.convert_tokens_to_ids(each) for each in ("<|say|>", "<|said|>"))
    new = ids[ids.index(first) + 1 : ids.index(last)]
    before, whole = (tokenizer.decode(some, skip_special_tokens=True) for some in (ids, ids + new))
    assert whole.startswith(before)
    return str(whole[len(before) :])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("text", TEXTS)
def test_a_completion(client: OpenAI, engine: str, text: str) -> None:
    prompt = prompt_of(text)
    right = expected(prompt)
    assert right.startswith(" ")
    fields: Any = {"model": engine, "prompt": prompt, "temperature": 0, "max_tokens": 40}
    assert client.completions.create(**fields).choices[0].text == right
    assert client.completions.create(**fields, echo=True).choices[0].text == prompt + right
    streamed = [chunk.choices[0].text for chunk in client.completions.create(**fields, stream=True)]
    assert "".join(streamed) == right


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_of_ids(client: OpenAI, engine: str) -> None:
    prompt = prompt_of(" Paris")
    ids = client.completions.create(model=engine, prompt=prompt, extra_body={"return_token_ids": True}, max_tokens=1)
    given = ids.choices[0].model_extra["prompt_token_ids"]
    done = client.completions.create(model=engine, prompt=given, temperature=0, max_tokens=9)
    assert done.choices[0].text == expected(prompt)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_string_may_begin_with_the_first_space(client: OpenAI, engine: str) -> None:
    fields: Any = {"model": engine, "prompt": prompt_of("Paris, the"), "temperature": 0, "max_tokens": 40}
    (choice,) = client.completions.create(**fields, stop=" Paris").choices
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert client.completions.create(**fields, stop=" the").choices[0].text == " Paris,"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_chat_begins_a_text_and_a_prefilled_one_goes_on(client: OpenAI, engine: str) -> None:
    def ask(messages: list[Any], **extra: Any) -> tuple[str, str]:
        fields: Any = {"model": engine, "messages": messages, "temperature": 0, "max_tokens": 40, "extra_body": extra}
        whole = client.chat.completions.create(**fields).choices[0].message.content
        chunks = client.chat.completions.create(**fields, stream=True)
        return whole, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    user: Any = {"role": "user", "content": say("Paris, the")}
    assert ask([user]) == ("Paris, the",) * 2
    prefilled = [user, {"role": "assistant", "content": f"The capital is{say(' Paris')}"}]
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    assert ask(prefilled, **going_on) == ("  Paris",) * 2


def test_a_texts_first_token_has_no_space_after_nothing_but_special_tokens(client: OpenAI) -> None:
    prompt = "<|say|>Paris<|said|>"
    ids = sentencepiece()(prompt)["input_ids"]
    assert ids
    done = client.completions.create(model="continuous_batching", prompt=prompt, temperature=0, max_tokens=9)
    assert done.choices[0].text == expected(prompt)
