"""The API over real engines with tiny random models."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import openai
import pytest
import requests
import torch
from openai import OpenAI

from tests.openai.conftest import Serve, Server
from tests.tiny import byte_tokenizer, llama

LOADER = "tests.openai.tiny_models"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "save", "parameters": SCHEMA}}
FINISH = {"type": "function", "function": {"name": "finish", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tiny(serve: Serve) -> Server:
    engine = {"pack_linears": False, "threads": 1}
    names = {"plain": "load_model", "tools": "with_tools", "embed": "with_embed", "broken": "with_broken_embed"}
    return serve([{"id": name, "loader": f"{LOADER}:{loader}", "engine": engine} for name, loader in names.items()])


@pytest.fixture(scope="module")
def client(tiny: Server) -> OpenAI:
    return tiny.client(timeout=60)


def ask(client: OpenAI, content: str = "hello", model: str = "plain", **fields: Any) -> Any:
    fields = {"max_tokens": 12, "temperature": 0, **fields}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], **fields)


def test_greedy_is_generate(client: OpenAI) -> None:
    tokenizer, model = byte_tokenizer(), llama(max_position_embeddings=1024)
    answer = ask(client, extra_body={"return_token_ids": True}, max_tokens=20)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert answer.prompt_token_ids == ids[0].tolist()
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert answer.choices[0].token_ids == expected
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, max_tokens=20))
    assert streamed == answer.choices[0].message.content


def test_several_prompts_and_choices(client: OpenAI) -> None:
    prompts = ["a", "bb", "ccc"]
    alone = [client.completions.create(model="plain", prompt=p, temperature=0).choices[0].text for p in prompts]
    together = client.completions.create(model="plain", prompt=prompts, temperature=0, n=2)
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]


def test_seeds(client: OpenAI) -> None:
    def texts(seed: int | None) -> list[str]:
        answer = ask(client, temperature=1, n=3, seed=seed)
        return [choice.message.content for choice in answer.choices]

    assert texts(5) == texts(5)
    assert len(set(texts(5))) == 3
    assert texts(5) != texts(6)
    assert texts(None) != texts(None)


def test_what_lm_eval_relies_on(tiny: Server) -> None:
    client = tiny.client(_strict_response_validation=False, timeout=60)
    tokenizer, model = byte_tokenizer(), llama(max_position_embeddings=1024)
    prompts = [tokenizer("The sky is blue").input_ids, tokenizer("No").input_ids]
    answer = client.completions.create(
        model="plain", prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    for ids, choice in zip(prompts, answer.choices, strict=True):
        found: Any = choice.logprobs
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + 1
        assert found.token_logprobs[0] is None
        for i in range(1, len(ids)):
            assert found.token_logprobs[i] == pytest.approx(logprobs[i - 1, ids[i]].item(), abs=1e-4)
            greedy = found.token_logprobs[i] == max(found.top_logprobs[i].values())
            assert greedy == (logprobs[i - 1].argmax().item() == ids[i])
        assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())


def test_random_weights_keep_to_a_schema(client: OpenAI) -> None:
    for seed in range(3):
        answer = ask(
            client,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
            temperature=1,
            seed=seed,
            max_tokens=200,
        )
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
    assert ask(client, extra_body={"guided_choice": ["yes", "no"]}).choices[0].message.content in ("yes", "no")
    assert ask(client, extra_body={"guided_regex": "[0-9]{3}"}).choices[0].message.content.isdigit()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "save"}}])
def test_random_weights_make_valid_calls(client: OpenAI, choice: Any) -> None:
    for seed in range(3):
        fields: Any = {
            "tools": [TOOL, FINISH],
            "tool_choice": choice,
            "temperature": 1,
            "seed": seed,
            "max_tokens": 300,
        }
        message = ask(client, model="tools", **fields).choices[0].message
        assert message.tool_calls
        for call in message.tool_calls:
            schema = SCHEMA if call.function.name == "save" else {"type": "object"}
            jsonschema.validate(json.loads(call.function.arguments), schema)


def test_tools_need_a_template_that_knows_them(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no place for tools") as error:
        ask(client, tools=[TOOL])
    assert error.value.param == "tools"
    assert ask(client, tools=[TOOL], tool_choice="none").choices[0].message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}},
            "response_format",
        ),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
        ({"extra_body": {"regex": "("}}, "regex"),
        ({"extra_body": {"json_schema": {"type": "x"}}}, "json_schema"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs.regex"),
        ({"extra_body": {"stop_token_ids": [97, 261]}}, "stop_token_ids"),
        ({"extra_body": {"repeat_penalty": 1e-300, "repeat_last_n": -1}}, "repeat_penalty"),
        ({"extra_body": {"num_beams": 3, "bad_words": ["x"]}}, "bad_words"),
        ({"extra_body": {"generate_kwargs": {"penalty_alpha": 0.6}}}, "generate_kwargs"),
        ({"logit_bias": {"5": 1, "261": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"extra_body": {"repetition_penalty": 1e-300}}, "repetition_penalty"),
        ({"extra_body": {"allowed_token_ids": [97, 261]}}, "allowed_token_ids"),
        ({"extra_body": {"allowed_token_ids": [257], "min_tokens": 2}}, "allowed_token_ids"),
    ],
)
def test_what_the_engine_refuses(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **fields)
    assert error.value.param == param


def test_a_schema_of_a_tool_that_cannot_be_followed(client: OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}}}
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, model="tools", tools=[tool], tool_choice="required")
    assert error.value.param == "tools[0].function.parameters"


def test_context_overflow(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "x" * 2000)
    assert error.value.code == "context_length_exceeded"


def test_embeddings(client: OpenAI) -> None:
    model, tokenizer = llama(max_position_embeddings=1024), byte_tokenizer()
    texts = ["a text", "another one"]
    answer = client.embeddings.create(model="plain", input=texts, encoding_format="float")
    assert answer.usage.prompt_tokens == sum(len(tokenizer(text).input_ids) for text in texts)
    for text, item in zip(texts, answer.data, strict=True):
        with torch.inference_mode():
            state = model.model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(state, dim=0)
        assert torch.allclose(torch.tensor(item.embedding), expected, atol=1e-5)
    short = client.embeddings.create(model="plain", input=texts[0], dimensions=8, encoding_format="float").data[0]
    assert len(short.embedding) == 8
    assert math.isclose(sum(value**2 for value in short.embedding), 1, rel_tol=1e-5)


def test_embeddings_in_base64(tiny: Server) -> None:
    loose = tiny.client(_strict_response_validation=False)
    packed = loose.embeddings.create(model="plain", input="a text")  # the client asks for base64 by itself
    plain = loose.embeddings.create(model="plain", input="a text", encoding_format="float")
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding)
    ids = byte_tokenizer()("a text").input_ids
    assert loose.embeddings.create(model="plain", input=[ids]).data[0].embedding == packed.data[0].embedding


def test_the_embed_hook(client: OpenAI) -> None:
    answer = client.embeddings.create(model="embed", input=["ab", "abc"], encoding_format="float")
    assert [item.embedding for item in answer.data] == [[2.0, 3.0, 4.0], [3.0, 3.0, 4.0]]
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="embed", input=[1, 2])
    with pytest.raises(openai.InternalServerError, match="Hook embed returned"):
        client.embeddings.create(model="broken", input="a")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": "x" * 2000}, "input"),
        ({"input": [300]}, "input"),
        ({"input": "a", "dimensions": 1000}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_embedding_mistakes(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(**{"model": "plain", "encoding_format": "float", **fields})
    assert error.value.param == param


CHOICES = [" blue", " green and wide", "."]


def post(tiny: Server, path: str, **body: Any) -> Any:
    return requests.post(tiny.url + path, json={"model": "plain", **body}, timeout=60)


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_log_probabilities(tiny: Server, chat: bool) -> None:
    tokenizer, model = byte_tokenizer(), llama(max_position_embeddings=1024)
    messages = [{"role": "user", "content": "The sky is"}]
    given: dict[str, Any] = {"messages": messages} if chat else {"prompt": "The sky is"}
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) if chat else "The sky is"
    scores = post(tiny, "/v1/score", choices=CHOICES, **given).json()
    for item, choice in zip(scores["data"], CHOICES, strict=True):
        prompt = tokenizer(text, add_special_tokens=not chat).input_ids
        ids = tokenizer(text + choice, add_special_tokens=not chat).input_ids
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(logprobs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        assert item["logprob"] == pytest.approx(expected, abs=1e-3)
        assert item["tokens"] == len(choice)
    assert sum(item["probability"] for item in scores["data"]) == pytest.approx(1)
    assert scores["best"] == max(range(3), key=lambda index: scores["data"][index]["logprob"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "choices": []}, "choices"),
        ({"prompt": "a", "choices": [""]}, "choices"),
        ({"choices": ["a"]}, "prompt"),
        ({"prompt": "a", "choices": ["x" * 2000]}, "choices"),
        ({"prompt": "", "choices": ["a"]}, "prompt"),
    ],
)
def test_score_mistakes(tiny: Server, body: dict[str, Any], param: str) -> None:
    response = post(tiny, "/v1/score", **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_ids_that_are_no_tokens_have_no_text(tiny: Server) -> None:
    url, ids = f"{tiny.url}/v1/detokenize", byte_tokenizer().encode("ab", add_special_tokens=False)
    assert requests.post(url, json={"model": "plain", "tokens": ids}, timeout=20).json() == {"prompt": "ab"}
    answer = requests.post(url, json={"model": "plain", "tokens": [*ids, 261]}, timeout=20)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")
