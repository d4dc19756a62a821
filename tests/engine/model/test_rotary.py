"""Rotary frequencies that follow the length of a sequence: each sequence gets those it has by itself.

The right answer is `generate` of a fresh model for one prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PretrainedConfig,
)

from deployments.core.client import EmbedOptions
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.generate.engine import GenerateEngine
from deployments.host.embedding.embedder import Embedder
from deployments.host.embedding.text import EmbeddingText
from tests.engine.lacking import unless_it_lacks
from tests.engine.running import Alone, batching_engine, built_engine, generate_alone, model_info, prompt, submit
from tests.forms import covering, forms
from tests.tiny import llama

pytestmark = pytest.mark.usefixtures("one_thread")

BORDER, CONTEXT, TOKENS = 64, 256, 7
LENGTHS = (20, BORDER - 4, BORDER, BORDER + 1, 150, 9, 230)
"""Below this length, across it while decoding, exactly there, and beyond it."""
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": BORDER,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
SMALL: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def built(kind: Callable[[Any], Any], config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


def gemma(**types: dict[str, Any]) -> Any:
    config = Gemma3TextConfig(
        **SMALL,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=16,
        max_position_embeddings=BORDER,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=types,
    )
    return built(Gemma3ForCausalLM, config)


def phi3(**more: Any) -> Any:
    own = {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": BORDER, "rope_parameters": LONG}
    return built(Phi3ForCausalLM, Phi3Config(**{**SMALL, **own, **more}))


def phimoe() -> Any:
    rope = {**LONG, "short_mscale": 1.1, "long_mscale": 1.4}
    own = {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": BORDER, "num_local_experts": 4}
    return built(PhimoeForCausalLM, PhimoeConfig(**SMALL, **own, rope_parameters=rope))


MODELS: dict[str, Callable[[], Any]] = {
    "dynamic": lambda: llama(max_position_embeddings=BORDER, rope_parameters=dict(DYNAMIC)),
    "longrope": lambda: llama(max_position_embeddings=CONTEXT, rope_parameters=dict(LONG)),
    "phi3": phi3,
    "phimoe": phimoe,
    "one layer type": lambda: gemma(
        sliding_attention={"rope_type": "default", "rope_theta": 10000.0}, full_attention=dict(DYNAMIC)
    ),
    "two layer types": lambda: gemma(sliding_attention={**LONG, "factor": 2.0}, full_attention=dict(DYNAMIC)),
}
COMMON = prompt(99, 100)
PROMPTS = [prompt(i, length) for i, length in enumerate(LENGTHS)]
TURNS = [COMMON[:40], COMMON[:50], COMMON[:90], COMMON]
"""Each begins like the one before."""


@pytest.fixture(scope="module", params=MODELS)
def known(request: pytest.FixtureRequest) -> tuple[Callable[[], Any], list[Alone]]:
    """A model, and what fresh ones answer."""
    make = MODELS[request.param]
    with unless_it_lacks(request.param):
        batching_engine(make(), max_model_len=CONTEXT).close(5)
        return make, [generate_alone(make(), ids, TOKENS) for ids in (*PROMPTS, *TURNS)]


def check(engine: BatchingEngine, prompts: Sequence[list[int]], right: Sequence[Alone], *, together: bool) -> None:
    answers = []
    for ids in prompts:
        answers.append(submit(engine, ids, TOKENS, logprobs=0))
        if not together:
            answers[-1].wait()
    for ids, answer, alone in zip(prompts, answers, right, strict=True):
        assert answer.wait().token_ids == alone.token_ids, f"after {len(ids)} tokens"
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "chunks": {"prefill_chunk": 48, "max_batch_size": 3},
    "deterministic": {"deterministic": True, "prefill_chunk": 48},
    "guesses": {"prompt_lookup": 4},
    "guesses in chunks": {"prefill_chunk": 48, "max_batch_size": 3, "prompt_lookup": 4},
}


@forms("rounds", 1, 2)
@covering(("known", MODELS), ("name", OPTIONS), meet=1, fixtures=["known"])
def test_neighbors_chunks_and_prefixes(known: tuple[Callable[[], Any], list[Alone]], name: str, rounds: int) -> None:
    make, right = known
    engine = batching_engine(make(), max_model_len=CONTEXT, **OPTIONS[name])
    try:
        for _ in range(rounds):
            check(engine, [*PROMPTS, *TURNS], right, together=True)
            check(engine, [*TURNS, *PROMPTS], [*right[len(PROMPTS) :], *right[: len(PROMPTS)]], together=False)
    finally:
        engine.close(5)


def test_scored_prompts(known: tuple[Callable[[], Any], list[Alone]]) -> None:
    make, _ = known
    engine = batching_engine(make(), max_model_len=CONTEXT, prefill_chunk=48)
    answers = [submit(engine, ids, 1, prompt_logprobs=0) for ids in PROMPTS]
    for ids, answer in zip(PROMPTS, answers, strict=True):
        scores = answer.wait().scores
        with torch.inference_mode():
            logprobs = make()(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert scores is not None
        found = [score.logprob for score in scores.scores if score is not None]
        assert found == pytest.approx([logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1)], abs=1e-4)
    engine.close(5)


@pytest.mark.parametrize("kind", ["dynamic", "phi3"])
def test_the_generate_engine(kind: str) -> None:
    make = MODELS[kind]
    engine = built_engine(model_info(make()), kind="generate", max_model_len=CONTEXT)
    assert isinstance(engine, GenerateEngine)
    for _ in range(2):
        answers = [submit(engine, ids, TOKENS) for ids in PROMPTS]  # type: ignore[arg-type]
        for ids, answer in zip(PROMPTS, answers, strict=True):
            assert answer.wait().token_ids == generate_alone(make(), ids, TOKENS).token_ids, f"after {len(ids)} tokens"
    engine.close(5)


def test_the_probe_at_load_takes_sequences(known: tuple[Callable[[], Any], list[Alone]]) -> None:
    engine = built_engine(model_info(known[0]()), max_model_len=CONTEXT, memory_gib=0.25)
    assert isinstance(engine, BatchingEngine)
    engine.close(5)


def embedded(model: Any, prompts: Sequence[list[int]]) -> torch.Tensor:
    embedder = Embedder(model_info(model), None, pooling=None)
    texts = [EmbeddingText(text=None, ids=ids, extra={}) for ids in prompts]
    groups = embedder.batches(texts)
    found = [embedder.vectors([texts[i] for i in group], EmbedOptions()) for group in groups]
    return torch.cat(found)[torch.tensor([i for group in groups for i in group]).argsort()]


def test_embeddings_between_requests() -> None:
    """An embedding leaves the frequencies of the engine's sequences alone, and they leave its own alone."""
    make = MODELS["dynamic"]
    model = make()
    right = torch.cat([embedded(make(), [ids]) for ids in PROMPTS])
    engine = batching_engine(model, max_model_len=CONTEXT)
    for ids in PROMPTS:
        running = submit(engine, ids, TOKENS)
        assert torch.allclose(embedded(model, PROMPTS), right, atol=1e-5)
        assert running.wait().token_ids == generate_alone(make(), ids, TOKENS).token_ids
    engine.close(5)


STATIC: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": BORDER, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": BORDER,
        "rope_theta": 10000.0,
    },
    "dynamic": DYNAMIC,
    "longrope": LONG,
}


@pytest.mark.parametrize("kind", STATIC)
def test_forwards_are_shared(kind: str) -> None:
    """Sequences of every type decode together; one that never reaches that length costs what any model costs."""
    model = llama(max_position_embeddings=BORDER, rope_parameters=dict(STATIC[kind]))
    engine = batching_engine(model, max_model_len=BORDER, prefix_cache=False)
    rows, forwards = [], 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal forwards
        forwards += 1
        rows.append(kwargs["input_ids"].shape[0])

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    answers = [submit(engine, prompt(i, 20), 30) for i in range(4)]
    for answer in answers:
        answer.wait()
    handle.remove()
    engine.close(5)
    assert max(rows) == 4
    assert forwards <= 40
