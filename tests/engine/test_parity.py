"""Batches give what `generate` gives, for every architecture: joined and left at any step, whatever the neighbors."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.cache.cache import UnknownLayer
from deployments.engine.verify.capabilities import check_batchable
from deployments.engine.verify.refused import Refused, Unfaithful
from tests.engine.architectures import DECODERS, ENCODER_DECODERS, NOT_HELD, VISION, decoder, encoder_decoder, whisper
from tests.engine.lacking import unless_it_lacks
from tests.engine.running import Answer, batching_engine, generate_alone, prompt, submit
from tests.forms import forms, some


@dataclass(frozen=True)
class Plan:
    """Requests: the lengths of their prompts and texts, and which are dropped after how many tokens."""

    lengths: tuple[int, ...]
    tokens: tuple[int, ...]
    dropped: Mapping[int, int]

    @property
    def prompts(self) -> list[list[int]]:
        return [prompt(i, length) for i, length in enumerate(self.lengths)]


SHORT = Plan((40, 1, 7, 70, 25, 3), (9, 7, 14, 6, 8, 6), {2: 6})
LONG = Plan((40, 1, 7, 3, 170, 25, 2, 60, 5), (12, 10, 25, 30, 8, 25, 5, 20, 15), {2: 6, 5: 9})
BOTH = forms("plan", SHORT, LONG)

EXAMPLES = (
    *("bloom", "falcon", "gpt2", "gpt_neo", "llama", "mpt", "opt", "smollm3", "trocr", "xglm"),
    *("deepseek_v3", "gemma3_text", "gemma3n_text", "gpt_oss", "llama4_text", "longcat_flash", "phimoe", "qwen2"),
    *("falcon_h1", "falcon_mamba", "jamba", "lfm2", "mamba2", "nemotron_h", "qwen3_next", "zamba", "zaya"),
)
"""Decoders of which none keeps positions, windows, experts or states as another does."""

pytestmark = pytest.mark.usefixtures("one_thread")


def staggered(
    engine: BatchingEngine,
    plan: Plan,
    prompts: Sequence[Sequence[int]],
    inputs: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> list[Answer]:
    """Send a few requests at once and each further one at some token of another; drop some on their way."""
    answers: list[Answer] = []
    sending = threading.Lock()

    def send() -> None:
        """The next request; two threads send, so that one looks and sends at a time."""
        with sending:
            i = len(answers)
            if i == len(prompts):
                return
            answers.append(
                submit(
                    engine,
                    prompts[i],
                    plan.tokens[i],
                    name=str(i),
                    inputs=inputs[i] if inputs else None,
                    content_key=str(i) if inputs else "",
                    logprobs=0,
                    on_delta=watch,
                )
            )

    def watch(answer: Answer) -> None:
        i = int(answer.request_id)
        if len(answer.token_ids) == plan.dropped.get(i):
            engine.cancel(answer.request_id)
            answer.done.set()
        if len(answer.token_ids) == 3 + i:
            send()

    while len(answers) < 3:
        send()
    while len(answers) < len(prompts):
        answers[-1].wait()
        if all(answer.done.is_set() for answer in answers):
            send()
    return [answer.wait() for answer in answers]


def assert_equal_alone(
    model: Any,
    plan: Plan,
    prompts: Sequence[Sequence[int]] = (),
    inputs: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> None:
    prompts = prompts or plan.prompts
    engine = batching_engine(model, inside=plan is LONG, max_batch_size=4, prefill_chunk=32)
    try:
        answers = staggered(engine, plan, prompts, inputs)
    finally:
        engine.close(5)
    for i, answer in enumerate(answers):
        alone = generate_alone(model, prompts[i], plan.tokens[i], **(inputs[i] if inputs else {}))
        count = len(answer.token_ids)
        assert count >= plan.dropped.get(i, plan.tokens[i])
        assert answer.token_ids == alone.token_ids[:count], f"request {i}"
        assert answer.logprobs == pytest.approx(alone.logprobs[:count], abs=1e-4), f"request {i}"


@BOTH
@some("kind", sorted(DECODERS), EXAMPLES)
def test_decoder(kind: str, plan: Plan) -> None:
    with unless_it_lacks(kind):
        model = decoder(kind)
        check_batchable(model)
        assert_equal_alone(model, plan)


@BOTH
@some("kind", ENCODER_DECODERS, ("bart", "led", "longt5", "t5"))
def test_encoder_decoder(kind: str, plan: Plan) -> None:
    with unless_it_lacks(kind):
        assert_equal_alone(encoder_decoder(kind), plan)


@BOTH
def test_whisper(plan: Plan) -> None:
    count = len(plan.lengths)
    features = [torch.randn((1, 8, 60), generator=torch.Generator().manual_seed(i)) for i in range(count)]
    prompts = [prompt(i, 1 + i % 4) for i in range(count)]
    assert_equal_alone(whisper(), plan, prompts, [{"input_features": spectrogram} for spectrogram in features])


@BOTH
@pytest.mark.parametrize("kind", sorted(VISION))
def test_vision(kind: str, plan: Plan) -> None:
    build, image, media = VISION[kind]
    prompts, inputs = [], []
    for i, ids in enumerate(plan.prompts):
        shows = i % 4 != 3
        at = min(i, len(ids))
        ids = [*ids[:at], *image, *ids[at:]] if shows else ids
        prompts.append(ids)
        inputs.append(media(ids, i) if shows else {})
    assert_equal_alone(build(), plan, prompts, inputs)


@pytest.mark.parametrize("kind", sorted(NOT_HELD))
def test_what_sequences_cannot_hold_is_refused(kind: str) -> None:
    """Never wrong: such a model is told apart at load, and served by the generate engine."""
    model = decoder(kind, **NOT_HELD[kind])

    def serve() -> None:
        check_batchable(model)
        batching_engine(model)

    with pytest.raises((Refused, Unfaithful, UnknownLayer, RuntimeError, IndexError)):
        serve()
