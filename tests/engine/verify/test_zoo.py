"""Engines with default options answer as `generate` alone does, for types that need care."""

from __future__ import annotations

import pytest

from deployments.engine.batching.engine import BatchingEngine
from tests.engine.as_alone import AsAlone, as_alone
from tests.engine.held import BATCHED, GENERATED, INDEXED
from tests.engine.lacking import INSTALLED, is_older
from tests.engine.zoo import ZOO
from tests.forms import some

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.acoustic_tokenizer_chunk_size.:FutureWarning"),  # VibeVoice's own, before 5.20
]

EXAMPLES = ("axk2", "blip", "florence2", "inkling_text", "janus", "mllama", "moonshine", "moshi", "phi3-longrope")
OTHERS = ("evolla", "idefics", "qwen4_exp_text", "roformer", "t5gemma", "vibevoice_asr", "vision-encoder-decoder")
"""Another type for each cause."""


def check_kind(name: str, checks: AsAlone, said: str) -> None:
    """The engine is the one that documentation names; one that batches nothing says why."""
    kind = checks.engine.stats().kind
    if name in GENERATED:
        assert kind == "generate"
        assert GENERATED[name] in said
    elif name in BATCHED:
        assert kind == "continuous_batching" or is_older(), said


@some("name", (*EXAMPLES, *OTHERS), EXAMPLES)
def test_some_answers_are_those_of_generate_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with as_alone(ZOO[name]) as checks:
        check_kind(name, checks, caplog.text)
        checks.briefly()


@some("name", BATCHED, [name for name in BATCHED if name not in (*EXAMPLES, *INDEXED)])
def test_types_that_get_sequences(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """In the suite, those that no other test here loads."""
    with as_alone(ZOO[name]) as checks:
        if checks.engine.stats().kind != "continuous_batching" and is_older():
            pytest.skip(f"transformers {INSTALLED} does not batch {name}: {caplog.messages[-1]}")
        check_kind(name, checks, caplog.text)


@some("name", sorted(GENERATED), GENERATED.keys() - set(EXAMPLES))
def test_types_that_sequences_cannot_hold_and_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with as_alone(ZOO[name]) as checks:
        check_kind(name, checks, caplog.text)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_answer_is_that_of_generate_alone(name: str) -> None:
    with as_alone(ZOO[name]) as checks:
        checks.everything()


@pytest.mark.parametrize("name", ["fsmt", "unlimited_ocr"])
def test_requests_that_wait_change_nothing(name: str) -> None:
    with as_alone(ZOO[name], max_batch_size=2) as checks:
        prompts = checks.prompts((40, 12, 9, 30), media=not checks.specimen.text)
        checks.queued(prompts, (40, 18, 25, 12))


@some("name", INDEXED, ("deepseek_v32", "glm5_next", "qwen4_exp_text"))
def test_what_a_sequence_leaves_in_its_place_does_not_count(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Some indexers find a sequence's first token by what is in the columns before it."""
    with as_alone(ZOO[name]) as checks:
        check_kind(name, checks, caplog.text)
        assert isinstance(checks.engine, BatchingEngine)
        assert 16 in checks.engine.capabilities.crossed
        assert checks.engine.capabilities.mixes, "sequences mix although an indexer chooses"
        prompts = checks.prompts([57, 45, 18], media=False)
        runs = [checks.send(prompts[0], max_tokens=40), checks.send(prompts[1], max_tokens=4)]
        runs[1].wait()
        checks.check(prompts, [*runs, checks.send(prompts[2])])
