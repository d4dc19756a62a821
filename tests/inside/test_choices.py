"""Steered choices over HTTP: each with its own text and states, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deployments.inside_client import load_capture
from tests import tiny
from tests.inside.conftest import KEYS
from tests.inside.test_interventions import DIRECTION, POSITIONS, steered_alone
from tests.openai.conftest import Server

COUNT = 6
ADD = {"module": "model.layers.0", "op": "add", "vector": DIRECTION.tolist(), "scale": 3.0}


def asked(where: Any, **more: Any) -> dict[str, Any]:
    extra = {
        "interventions": [{**ADD, "positions": where}],
        "capture": {"modules": ["model.norm", "lm_head"], "positions": "generated"},
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return {
        "model": "tiny",
        "prompt": "abcdefgh",
        "max_tokens": COUNT,
        "n": 4,
        "logprobs": 0,
        "extra_body": extra,
        **more,
    }


class Choice:
    """A choice, put together from its chunks or whole."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.prompt_ids: list[int] = []
        self.logprobs: list[float] = []
        self.handles: list[dict[str, Any]] = []

    def add(self, part: Any) -> None:
        extra = part.model_extra or {}
        self.text += part.text
        self.token_ids += extra.get("token_ids") or []
        self.prompt_ids = extra.get("prompt_token_ids") or self.prompt_ids
        self.logprobs += part.logprobs.token_logprobs if part.logprobs else []
        self.handles += [extra["capture"]] if "capture" in extra else []


def choices(server: Server, stream: bool, **given: Any) -> list[Choice]:
    """The choices of an answer in order."""
    client = server.client(api_key=KEYS[0], _strict_response_validation=False)
    found: dict[int, Choice] = {}
    for answer in client.completions.create(**given, stream=True) if stream else [client.completions.create(**given)]:
        for part in answer.choices:
            found.setdefault(part.index, Choice()).add(part)
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("where", ["all", "generated", "last_prompt", "prompt", "some"])
def test_every_steered_choice_is_that_of_a_torch_hook_whole_and_streamed(inside: Server, where: str) -> None:
    positions, chosen = POSITIONS[where]
    for stream in (False, True):
        answered = choices(inside, stream, **asked(positions, temperature=0))
        assert len(answered) == 4
        (ids,) = {tuple(choice.prompt_ids) for choice in answered}
        expected = steered_alone(tiny.llama(), list(ids), COUNT, lambda h: h + 3 * DIRECTION, chosen)
        for choice in answered:
            assert choice.token_ids == expected[0]
            assert choice.logprobs == pytest.approx(expected[1], abs=1e-4)


def test_sampled_choices_are_the_same_whole_and_streamed(inside: Server) -> None:
    """Each with one handle, whose states its own tokens follow from."""
    given = asked("all", temperature=1, seed=5)
    whole, streamed = (choices(inside, stream, **given) for stream in (False, True))
    assert len({choice.text for choice in whole}) == len(whole) == len(streamed) == 4
    head = tiny.llama().lm_head.weight
    for one, other in zip(whole, streamed, strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        files = []
        for choice in (one, other):
            (handle,) = choice.handles
            file = load_capture(inside.url, handle, api_key=KEYS[0])
            assert file.token_ids.tolist() == choice.token_ids[:-1]
            logits = file["model.norm"] @ head.T
            torch.testing.assert_close(file["lm_head"], logits, atol=1e-4, rtol=1e-5)
            follow = logits.log_softmax(-1)[range(COUNT - 1), choice.token_ids[1:]]
            assert choice.logprobs[1:] == pytest.approx(follow.tolist(), abs=1e-4)
            files.append(file)
        torch.testing.assert_close(files[0]["model.norm"], files[1]["model.norm"], atol=1e-5, rtol=1e-5)
    handles = [choice.handles[0]["id"] for choice in [*whole, *streamed]]
    assert len(set(handles)) == 8
