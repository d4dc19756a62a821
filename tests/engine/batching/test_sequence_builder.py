"""The state of a request is made beside the thread that computes and the one that submits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deployments.config.engine import EngineOptions
from deployments.core.calls import Grammar, SamplingParams
from deployments.core.errors import ModelError, Unavailable
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.text.vocabulary import Vocabulary
from model_loaders.prompts.hooks import Hooks
from tests.engine.architectures import decoder
from tests.engine.running import Answer, generate_alone, model_info, prompt, submit, words

BAD_WORDS = {"bad_words": ("<7>",)}


class Gate:
    """A decode hook that notes who calls it, and waits while it is closed."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.reached = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def decode(self, token_ids: torch.Tensor) -> str:
        self.threads.add(threading.current_thread().name)
        if threading.current_thread().name not in ("batching-engine", "MainThread"):
            self.reached.set()
            assert self.open.wait(30)
        return words(token_ids)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture(scope="module")
def llama() -> Any:
    return decoder("llama")


def engine_of(model: Any, gate: Gate) -> BatchingEngine:
    info = model_info(model)
    info.decode = gate.decode
    return BatchingEngine(info, Vocabulary(Hooks(info)), EngineOptions(memory_gib=0.25))


@pytest.mark.parametrize(
    "fields",
    [
        BAD_WORDS,
        {"logprobs": -1},
        {"prompt_logprobs": -1},
        {"grammar": Grammar(kind="choice", source='["<5>", "<6>"]')},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_neither_the_caller_nor_the_engine_looks_up_a_vocabulary(
    llama: Any, gate: Gate, fields: dict[str, Any]
) -> None:
    engine = engine_of(llama, gate)
    gate.open.clear()
    gate.threads.clear()
    answer = submit(engine, prompt(0, 5), 3, **fields)
    assert gate.reached.wait(30)
    assert not gate.threads & {"MainThread", "batching-engine"}
    gate.open.set()
    assert answer.done.wait(30)
    assert "MainThread" not in gate.threads
    engine.close()


@pytest.mark.parametrize("fields", [BAD_WORDS, {"logprobs": -1}], ids=["bad_words", "logprobs"])
def test_others_pass_a_request_that_waits_for_a_table(llama: Any, gate: Gate, fields: dict[str, Any]) -> None:
    engine = engine_of(llama, gate)
    gate.open.clear()
    waiting = submit(engine, prompt(0, 5), 3, **fields)
    assert gate.reached.wait(30)
    answer = submit(engine, prompt(1, 6), 5).wait()
    assert answer.token_ids == generate_alone(llama, prompt(1, 6), 5).token_ids
    assert not waiting.done.is_set()
    gate.open.set()
    waiting.wait()
    engine.close()


def test_what_is_cancelled_while_its_sequence_is_made_is_never_heard_of(llama: Any, gate: Gate) -> None:
    engine = engine_of(llama, gate)
    gate.open.clear()
    gone = submit(engine, prompt(0, 5), 3, name="same", **BAD_WORDS)
    assert gate.reached.wait(30)
    engine.cancel("same")
    again = submit(engine, prompt(1, 6), 4, name="same")
    assert again.wait().token_ids == generate_alone(llama, prompt(1, 6), 4).token_ids
    gate.open.set()
    submit(engine, prompt(0, 5), 3, **BAD_WORDS).wait()
    assert not gone.deltas
    assert not gone.done.is_set()
    engine.close()


@pytest.mark.parametrize("beams", [1, 2])
def test_closing_fails_what_is_still_being_made(llama: Any, gate: Gate, beams: int) -> None:
    engine = engine_of(llama, gate)
    gate.open.clear()
    first = submit(engine, prompt(0, 5), 3, **BAD_WORDS)
    assert gate.reached.wait(30)
    second = submit(engine, prompt(0, 5), 3, num_beams=beams, **({} if beams > 1 else BAD_WORDS))
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(Unavailable):
        first.wait()
    if beams == 1:
        with pytest.raises(Unavailable):
            second.wait()
    closing.join(30)
    assert not closing.is_alive()


class Picky:
    """A tokenizer without a fast backend that cannot decode one token."""

    def __len__(self) -> int:
        return 160

    def decode(self, token_ids: Any, **_: Any) -> str:
        if 7 in list(token_ids):
            raise RuntimeError("no such piece")
        return "".join(f"<{int(i)}>" for i in token_ids)


def test_a_sequence_that_cannot_be_made_fails_alone(llama: Any) -> None:
    info = model_info(llama)
    info.tokenizer, info.decode = Picky(), None
    engine = BatchingEngine(info, Vocabulary(Hooks(info)), EngineOptions(memory_gib=0.25))
    answers = []
    for ids in (prompt(0, 5), [9, 7], prompt(1, 6)):
        answer = Answer(f"r{len(answers)}")
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        engine.submit(
            EngineRequest(request_id=answer.request_id, input_ids=list(ids), sampling=params, continues=True),
            answer.emit,
        )
        answers.append(answer)
    with pytest.raises(ModelError, match="no such piece"):
        answers[1].wait()
    assert answers[0].wait().token_ids == generate_alone(llama, prompt(0, 5), 3).token_ids
    assert answers[2].wait().token_ids == generate_alone(llama, prompt(1, 6), 3).token_ids
    engine.close()
