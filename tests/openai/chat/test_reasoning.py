"""Stop strings and token counts around a model's reasoning, over the engine that calls a generate hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from openai import OpenAI

from deployments.local import model_app
from tests.seeds.serving import client, listening
from tests.tiny import byte_tokenizer, llama

THOUGHT = "<think>Question: what? stop</think>"
ANSWER = "Yes. stop No."


@pytest.fixture(scope="module")
def thinker() -> Any:
    """A model that thinks, and then answers."""
    tokenizer = byte_tokenizer()
    text = torch.tensor([tokenizer(THOUGHT + ANSWER, add_special_tokens=False).input_ids])

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        return torch.cat([input_ids, text[:, :max_new_tokens]], dim=1)

    source = {"model_name": "thinker", "model": llama(), "tokenizer": tokenizer, "generate": generate}
    app = model_app(source, id="thinker", api={"reasoning_parser": "think"})
    with listening(app) as address, client(address) as api:
        yield api


def ask(api: OpenAI, **fields: Any) -> Any:
    return api.chat.completions.create(model="thinker", messages=[{"role": "user", "content": "So?"}], **fields)


def test_stop_strings_do_not_end_a_thought(thinker: OpenAI) -> None:
    done = ask(thinker, stop=["stop", "Question:"])
    choice = done.choices[0]
    assert choice.message.reasoning_content == "Question: what? stop"
    assert choice.message.content == "Yes. "
    assert choice.model_extra["stop_reason"] == "stop"
    assert done.usage.completion_tokens_details.reasoning_tokens == len(THOUGHT)


def test_a_stream_counts_the_same(thinker: OpenAI) -> None:
    chunks = list(ask(thinker, stop="stop", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Yes. "
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == len(THOUGHT)


def test_responses_count_them_too(thinker: OpenAI) -> None:
    done = thinker.responses.create(model="thinker", input="So?")
    assert done.usage is not None
    assert done.usage.output_tokens_details.reasoning_tokens == len(THOUGHT)
    assert done.output_text == ANSWER


def test_a_completion_has_no_reasoning(thinker: OpenAI) -> None:
    done = thinker.completions.create(model="thinker", prompt="So?", stop="stop", max_tokens=60)
    assert done.choices[0].text == "<think>Question: what? "
