"""Questions with fixed answers: probabilities equal to those of a plain forward."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from tests.openai.conftest import Serve, Server
from tests.openai.tiny_models import TOOLS_TEMPLATE
from tests.tiny import byte_tokenizer, llama

PREDICATE = {"type": "predicate", "name": "p", "instructions": "It is blue."}
CHOICE = {
    "type": "choice",
    "instructions": "Which color?",
    "choices": [{"value": "red"}, {"value": "true", "description": "the text"}, {"value": True}],
}
SCORE = {
    "type": "score",
    "name": "s",
    "instructions": "How blue?",
    "levels": [{"label": "not"}, {"label": "somewhat", "description": "a little"}, {"label": "very"}],
}
MANY = {"type": "choice", "instructions": "Which number?", "choices": [{"value": str(n)} for n in range(40)]}


@pytest.fixture(scope="module")
def tiny(serve: Serve) -> Server:
    engine = {"pack_linears": False, "threads": 1}
    return serve([{"id": "plain", "loader": "tests.openai.tiny_models:with_tools", "engine": engine}])


@pytest.fixture(scope="module")
def client(tiny: Server) -> OpenAI:
    return tiny.client(timeout=60)


def decide(client: OpenAI, *questions: Any, **fields: Any) -> Any:
    return client.decisions.create(
        **{"model": "plain", "input": "The sky is blue.", "questions": questions, **fields}  # type: ignore[arg-type]
    )


def forward(question: str, labels: list[str], messages: list[Any] | None = None) -> tuple[list[float], list[float]]:
    """Of each label: its share among the labels, and its probability among all texts."""
    tokenizer, model = byte_tokenizer(), llama(max_position_embeddings=4096)
    turns = messages or [{"role": "user", "content": f"The sky is blue.\n{question}"}]
    template = {"chat_template": TOOLS_TEMPLATE, "tokenize": False, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(turns, **template)
    totals = []
    for label in labels:
        prompt, ids = (tokenizer(t, add_special_tokens=False).input_ids for t in (text, text + label))
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        totals.append(sum(logprobs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
    return torch.tensor(totals).softmax(0).tolist(), [math.exp(total) for total in totals]


ENDING = "Reply with the letter of one line and nothing else."
ASKED = f"\nIs this true? It is blue.\nA: true\nB: false\n{ENDING}"


def test_probabilities_are_those_of_a_forward(client: OpenAI) -> None:
    decision = decide(client, PREDICATE, CHOICE, SCORE)
    predicate, choice, score = decision.answers
    shares, _ = forward(ASKED, ["A", "B"])
    assert (predicate.type, predicate.name) == ("predicate", "p")
    assert predicate.probability == pytest.approx(shares[0], abs=1e-4)

    shares, wholes = forward(
        f'\nQuestion: Which color?\nA: "red"\nB: "true" (the text)\nC: true\n{ENDING}', ["A", "B", "C"]
    )
    best = shares.index(max(shares))
    assert [item.value for item in choice.probabilities] == ["red", "true", True]
    assert [item.probability for item in choice.probabilities] == pytest.approx(shares, abs=1e-4)
    assert choice.choice is choice.probabilities[best].value
    assert choice.confidence == pytest.approx(wholes[best], abs=1e-4)

    shares, _ = forward(f"\nQuestion: How blue?\nA: not\nB: somewhat (a little)\nC: very\n{ENDING}", ["A", "B", "C"])
    assert [item.probability for item in score.probabilities] == pytest.approx(shares, abs=1e-4)
    assert score.score == pytest.approx(shares[1] + 2 * shares[2], abs=1e-4)
    assert [(item.value, item.label) for item in score.probabilities] == [(0, "not"), (1, "somewhat"), (2, "very")]
    assert decision.model == "plain"
    assert decision.usage.output_tokens == 3
    assert decision.usage.total_tokens == decision.usage.input_tokens + 3


def test_a_question_does_not_depend_on_the_others(client: OpenAI) -> None:
    alone = decide(client, SCORE).answers[0]
    together = decide(client, PREDICATE, SCORE, CHOICE, MANY).answers[1]
    assert together.score == pytest.approx(alone.score, abs=1e-4)


def test_more_options_than_letters(client: OpenAI) -> None:
    (answer,) = decide(client, MANY).answers
    labels = [f"{number:03d}" for number in range(1, 41)]
    lines = "\n".join(f'{label}: "{number}"' for number, label in enumerate(labels))
    question = f"\nQuestion: Which number?\n{lines}\nReply with the number of one line and nothing else."
    shares, wholes = forward(question, labels)
    assert [item.probability for item in answer.probabilities] == pytest.approx(shares, abs=1e-4)
    assert answer.choice == str(shares.index(max(shares)))
    assert answer.confidence == pytest.approx(max(wholes), abs=1e-4)


def test_inputs_of_every_kind(client: OpenAI) -> None:
    items = [
        {"role": "developer", "content": "Be strict."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_json", "data": {"b": 1}}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        {"type": "custom_tool_call", "call_id": "1", "name": "f", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "1", "output": "y"},
    ]
    predicate = {**PREDICATE, "instructions": [{"type": "input_text", "text": "It is blue."}]}
    (answer,) = decide(client, predicate, input=items).answers
    call = {"function": {"name": "f", "arguments": {"input": "x"}}}
    messages = [
        {"role": "system", "content": "Be strict."},
        {"role": "user", "content": 'a\n{"b":1}'},
        {"role": "assistant", "content": "c", "tool_calls": [call]},
        {"role": "tool", "content": "y"},
        {"role": "user", "content": f"\nIs this true?\nIt is blue.\nA: true\nB: false\n{ENDING}"},
    ]
    shares, _ = forward("", ["A", "B"], messages)
    assert answer.probability == pytest.approx(shares[0], abs=1e-4)


def test_fields_that_change_nothing(client: OpenAI) -> None:
    plain = decide(client, PREDICATE)
    same = decide(
        client, PREDICATE, safety_identifier="u", prompt_cache_key="k", prompt_cache_options={"mode": "explicit"}
    )
    assert same.answers == plain.answers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [PREDICATE] * 401}, "questions"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}]}]}, "questions[0].choice.choices"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}] * 2}]}, "questions[0].choice.choices"),
        ({"questions": [{**SCORE, "levels": [{"label": "a"}] * 11}]}, "questions[0].score.levels"),
        ({"questions": [{"type": "rank", "instructions": "a"}]}, "questions[0]"),
        ({"questions": [{**PREDICATE, "instruction": "a"}]}, "questions[0].predicate.instruction"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning_of_others"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_json", "data": 1}]}]}, "input[0].content[0].data"),
        ({"input": "x" * 5000}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,"}]}]},
            "input[0].content[0].image_url",
        ),
    ],
)
def test_mistakes(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        decide(client, **{"questions": [PREDICATE], **fields})
    assert error.value.param == param
