"""What fails between the forwards of a step concerns the sequences it was done for, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from deployments.core.errors import ModelError, OutOfMemory, Unavailable
from deployments.engine.base.protocol import Engine
from deployments.engine.batching.recovery import Recovery
from deployments.engine.batching.scheduler import Scheduler
from deployments.engine.cache.cache import BatchCache
from deployments.engine.cache.layers import KeyValueLayer
from deployments.engine.text.prompt_logprobs import PromptScorer
from tests.engine.architectures import decoder
from tests.engine.running import Answer, batching_engine, generate_alone, prompt, submit
from tests.engine.stepped import Stepped

PROMPTS = [prompt(i, 20 + i) for i in range(5)]
TOKENS = 8


@pytest.fixture(scope="module")
def llama() -> Any:
    return decoder("llama")


class Faults:
    """Lets a method raise at some of its calls."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Exception, calls: range = range(1)
    ) -> None:
        self.calls = 0
        self.raised = 0
        original: Callable[..., Any] = getattr(owner, name)

        def method(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls - 1 in calls:
                self.raised += 1
                raise error
            return original(this, *args, **kwargs)

        monkeypatch.setattr(owner, name, method)


def no_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def assert_alone(model: Any, answers: list[Answer], prompts: list[list[int]], tokens: int) -> None:
    for answer, ids in zip(answers, prompts, strict=True):
        assert answer.wait().token_ids == generate_alone(model, ids, tokens).token_ids


def test_sequences_that_find_no_memory_to_pause(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, prompts = 150, PROMPTS[:4]
    # Without kept prefixes sequences are copied only to pause.
    stepped = Stepped(
        llama, limits=lambda sizes: {"budget": 3 * sizes.of_sequence(20 + tokens), "growth": 16}, prefix_cache=False
    )
    faults = Faults(monkeypatch, BatchCache, "copy_sequence", no_memory())
    for i, ids in enumerate(prompts):
        stepped.add(str(i), ids, tokens)
    stepped.run()
    assert [stepped.texts[str(i)] for i in range(4)] == [
        generate_alone(llama, ids, tokens).token_ids for ids in prompts
    ]
    assert faults.raised


@pytest.mark.parametrize("kind", ["llama", "mamba2"])
@pytest.mark.parametrize("error", [no_memory(), RuntimeError("a bug")], ids=["memory", "bug"])
def test_prefixes_that_cannot_be_kept(kind: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of finished sequences, and of prompts whose states no crop brings back."""
    model = decoder(kind)
    engine = batching_engine(model)
    faults = Faults(monkeypatch, BatchCache, "copy_sequence", error, range(3))
    answers = [submit(engine, ids, TOKENS) for ids in PROMPTS]
    assert_alone(model, answers, PROMPTS, TOKENS)
    assert_alone(model, [submit(engine, ids, TOKENS) for ids in PROMPTS], PROMPTS, TOKENS)
    assert faults.raised == 3
    engine.close()


@pytest.mark.parametrize("guilty", [0, 2, 4])
def test_prompt_scores_for_which_there_is_no_memory(llama: Any, monkeypatch: pytest.MonkeyPatch, guilty: int) -> None:
    engine = batching_engine(llama)
    Faults(monkeypatch, PromptScorer, "scores", no_memory(), range(guilty, guilty + 1))
    answers = [submit(engine, ids, TOKENS, prompt_logprobs=1) for ids in PROMPTS]
    failed = []
    for answer, ids in zip(answers, PROMPTS, strict=True):
        assert answer.done.wait(60)
        if answer.error is not None:
            failed.append(answer)
        else:
            assert answer.token_ids == generate_alone(llama, ids, TOKENS).token_ids
            assert answer.scores is not None
    assert [type(answer.error) for answer in failed] == [OutOfMemory]
    assert not failed[0].deltas
    engine.close()


@pytest.mark.parametrize("error", [no_memory(), RuntimeError("a bug")], ids=["memory", "bug"])
@pytest.mark.parametrize("calls", [range(1), range(1, 2), range(3)], ids=["first", "second", "three"])
def test_sequences_that_cannot_leave_their_batch(
    llama: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, calls: range
) -> None:
    engine = batching_engine(llama)
    faults = Faults(monkeypatch, KeyValueLayer, "drop", error, calls)
    lengths = [3, 9, 5, 12, 7]
    answers = [submit(engine, ids, n) for ids, n in zip(PROMPTS, lengths, strict=True)]
    for answer, ids, n in zip(answers, PROMPTS, lengths, strict=True):
        assert answer.wait().token_ids == generate_alone(llama, ids, n).token_ids
        assert sum(delta.finish_reason is not None for delta in answer.deltas) == 1
    assert faults.raised
    engine.close()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Scheduler, "begin_step"), (Scheduler, "next_group"), (Scheduler, "joinable"), (Recovery, "end_step")],
)
def test_a_step_that_fails_once_ends_nobody(
    llama: Any, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    engine = batching_engine(llama)
    faults = Faults(monkeypatch, owner, name, RuntimeError("a bug"), range(4, 5))
    answers = [submit(engine, ids, 40) for ids in PROMPTS]
    assert_alone(llama, answers, PROMPTS, 40)
    assert faults.raised
    engine.close()


@pytest.mark.parametrize("name", ["begin_step", "joinable"])
def test_a_step_that_fails_ever_again_ends_all_and_the_engine_goes_on(
    llama: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = batching_engine(llama)
    with monkeypatch.context() as broken:
        Faults(broken, Scheduler, name, RuntimeError("a bug"), range(10_000))
        for answer in [submit(engine, ids, 40) for ids in PROMPTS]:
            with pytest.raises(ModelError, match="a bug"):
                answer.wait()
    assert_alone(llama, [submit(engine, ids, TOKENS) for ids in PROMPTS], PROMPTS, TOKENS)
    engine.check()
    engine.close()


def test_a_cancellation_that_fails_does_not_stop_the_engine(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = batching_engine(llama)
    Faults(monkeypatch, KeyValueLayer, "drop", RuntimeError("a bug"))

    def leave(answer: Answer) -> None:
        if len(answer.token_ids) == 3:
            engine.cancel(answer.request_id)

    first = submit(engine, PROMPTS[0], 200, on_delta=leave)
    others = [submit(engine, ids, 40) for ids in PROMPTS[1:]]
    assert_alone(llama, others, PROMPTS[1:], 40)
    assert not first.done.is_set()
    engine.check()
    engine.close()


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (LlamaForCausalLM, "forward", 0),
        (LlamaForCausalLM, "forward", 20),
        (PromptScorer, "scores", 0),
    ],
)
def test_a_gpu_that_computes_nothing_more_ends_the_engine(
    llama: Any, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int
) -> None:
    """From some call on, every one fails: so does a GPU after a failed assert, whatever is tried."""
    engine = batching_engine(llama)
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    faults = Faults(monkeypatch, owner, name, error, range(call, 10_000))
    answers = [submit(engine, ids, 40, prompt_logprobs=1 if owner is PromptScorer else None) for ids in PROMPTS]
    assert_ended(engine, answers)
    assert faults.raised == 1, "nothing is computed again"


def test_a_gpu_that_computes_nothing_more_as_sequences_join_ends_the_engine(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = batching_engine(llama)
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    faults = Faults(monkeypatch, KeyValueLayer, "append", error, range(1, 10_000))
    others: list[Answer] = []

    def join(first: Answer) -> None:
        if not others:
            others.extend(submit(engine, ids, 40) for ids in PROMPTS[1:])

    first = submit(engine, PROMPTS[0], 40, on_delta=join)
    assert_ended(engine, [first.end(), *others])
    assert faults.raised == 1, "nothing is computed again"


def assert_ended(engine: Engine, answers: list[Answer]) -> None:
    """All of them have failed, and so will every other request."""
    for answer in answers:
        with pytest.raises(Unavailable, match="device-side assert"):
            answer.wait()
    with pytest.raises(ModelError, match="GPU computes nothing more in this process"):
        engine.check()
    with pytest.raises(Unavailable, match="engine has stopped"):
        submit(engine, PROMPTS[0], 4)
    engine.close()


def test_a_gpu_that_computes_nothing_more_is_noticed_after_the_last_token(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for a prefix that cannot be kept, but nothing will be computed any more."""
    engine = batching_engine(llama)
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    faults = Faults(monkeypatch, BatchCache, "copy_sequence", error, range(10_000))
    submit(engine, PROMPTS[0], 20).wait()
    with pytest.raises(Unavailable, match="device-side assert"):
        submit(engine, PROMPTS[1], 20).wait()
    assert faults.raised == 1
    engine.close()
