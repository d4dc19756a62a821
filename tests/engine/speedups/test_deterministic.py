"""Deterministic mode: tokens and log-probabilities of a sequence, bit by bit, alone and among neighbors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.model.forward import Forward
from deployments.engine.model.patches import Patches
from deployments.engine.speedups.deterministic import make_deterministic, steady_linears
from deployments.engine.speedups.packed_linear import pack_linears
from tests.engine.running import Answer, batching_engine, prompt, submit
from tests.forms import forms
from tests.tiny import gpt2, llama, mistral

SIZE: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}


def sliding() -> Any:
    return mistral(**SIZE, sliding_window=24)


def wide_gpt2() -> Any:
    return gpt2(n_embd=64, n_head=4, n_positions=1024)


def mamba2() -> Any:
    size = {"num_heads": 16, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 16, "initializer_range": 0.3}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=261, hidden_size=64, num_hidden_layers=2, **size))


def experts() -> Any:
    size = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, **size))


def large() -> Any:
    """Wide enough for kernels that sum in blocks."""
    return llama(hidden_size=256, intermediate_size=2048, num_hidden_layers=1, initializer_range=0.05)


MODELS = (llama, large, sliding, wide_gpt2, mamba2, experts)
SUITE = {*zip(MODELS, (torch.float32, torch.bfloat16) * 3, strict=True)}
CASES = [
    pytest.param(
        *(make, dtype),
        id=f"{make.__name__}-{str(dtype)[6:]}",
        marks=() if (make, dtype) in SUITE else pytest.mark.long,
    )
    for make in MODELS
    for dtype in (torch.float32, torch.bfloat16)
    if (make, dtype) != (mamba2, torch.bfloat16)  # this one's rounding is too coarse for any batching
]


def built(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return make().to(dtype).eval()


Request = tuple[list[int], int, dict[str, Any]]


def requests(count: int, tokens: tuple[int, int] = (1, 14)) -> list[Request]:
    """Prompts of all lengths, some that begin alike, greedy and drawn."""
    chance = random.Random(7)
    shared = [prompt(seed, 90) for seed in (1, 2)]
    asked: list[Request] = []
    for number in range(count):
        ids = prompt(100 + number, chance.randrange(1, 150))
        if number % 3 == 0:
            ids = shared[number % 2] + ids[:20]
        sampling = {"temperature": 0.8 if number % 2 else 0.0, "seed": number, "logprobs": 2}
        asked.append((ids, chance.randrange(*tokens), sampling))
    return asked


def outcome(answer: Answer) -> tuple[list[int], list[float]]:
    entries = [entry for delta in answer.wait(600).deltas for entry in delta.logprobs or ()]
    return answer.token_ids, [p for entry in entries for p in (entry.logprob, *(c.logprob for c in entry.top))]


def together(engine: BatchingEngine, asked: list[Request]) -> list[tuple[list[int], list[float]]]:
    answers = [submit(engine, ids, new, **sampling) for ids, new, sampling in asked]
    return [outcome(answer) for answer in answers]


def alone(engine: BatchingEngine, asked: list[Request]) -> list[tuple[list[int], list[float]]]:
    return [outcome(submit(engine, ids, new, **sampling)) for ids, new, sampling in asked]


@forms("count", 18, 40)
@pytest.mark.parametrize(("make", "dtype"), CASES)
def test_bits_do_not_depend_on_neighbors(make: Callable[[], Any], dtype: torch.dtype, count: int) -> None:
    asked = requests(count)
    options = {"deterministic": True, "max_batch_size": 16, "prefill_chunk": 32}
    single = batching_engine(built(make, dtype), **options, prefix_cache=False)
    expected = alone(single, asked)
    single.close()
    engine = batching_engine(built(make, dtype), **options)
    assert together(engine, asked) == expected
    random.Random(1).shuffle(asked)
    again = together(engine, asked)
    engine.close()
    assert sorted(again) == sorted(expected)


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_requests_at_32_sequences(dtype: torch.dtype) -> None:
    # A step begins one prompt: texts this long let 32 sequences come together.
    asked = requests(1000, tokens=(34, 44))
    single = batching_engine(
        built(large, dtype), deterministic=True, max_batch_size=32, prefill_chunk=64, prefix_cache=False
    )
    expected = alone(single, asked)
    single.close()
    engine = batching_engine(built(large, dtype), deterministic=True, max_batch_size=32, prefill_chunk=64)
    rows = []
    answers = [
        submit(engine, ids, new, on_delta=lambda _: rows.append(engine.stats().sequences), **s) for ids, new, s in asked
    ]
    assert [outcome(answer) for answer in answers] == expected
    assert max(rows) == 32
    assert engine.stats().cached_tokens > 10_000
    engine.close()


def test_without_it_bits_do_depend_on_neighbors() -> None:
    asked = requests(18)
    engine = batching_engine(built(large, torch.float32), max_batch_size=16, prefill_chunk=32, prefix_cache=False)
    expected, got = alone(engine, asked), together(engine, asked)
    engine.close()
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
    assert got != expected


def test_prefixes_are_reused_at_alignments() -> None:
    engine = batching_engine(built(llama, torch.float32), deterministic=True, prefill_chunk=32)
    first = prompt(1, 100)
    answer = submit(engine, first, 60).wait()
    assert submit(engine, first + prompt(2, 40), 4).wait().cached_tokens == 96
    # What was generated is not reused: a prompt's tokens are computed in chunks.
    assert submit(engine, first + answer.token_ids + prompt(3, 5), 4).wait().cached_tokens == 96
    engine.close()


def test_scored_prompts_keep_the_bits_of_others() -> None:
    ids = prompt(1, 120)
    engine = batching_engine(built(llama, torch.float32), deterministic=True, prefill_chunk=32, prefix_cache=False)
    expected = outcome(submit(engine, ids, 6, logprobs=0))
    engine.close()
    engine = batching_engine(built(llama, torch.float32), deterministic=True, prefill_chunk=32)
    submit(engine, ids, 6, prompt_logprobs=0).wait()
    assert outcome(submit(engine, ids, 6, logprobs=0)) == expected
    engine.close()


@pytest.mark.parametrize(("make", "dtype"), CASES)
def test_how_sequences_decode_and_the_model_afterwards(make: Callable[[], Any], dtype: torch.dtype) -> None:
    model = built(make, dtype)
    ids = torch.tensor([prompt(3, 20)])
    with torch.inference_mode():
        before = model(ids).logits
    patches, forward = Patches(), Forward(model)
    pack_linears(model, patches, True)
    assert make_deterministic(forward, 16, patches) == ("isolated" if make is experts else "together")
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)
    patches.close()
    assert not forward.decode_attention.per_sequence
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_kernel_that_depends_on_the_slot_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.linear

    def slanted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return real(x, weight, bias) + torch.arange(len(x))[:, None] * 1e-7

    monkeypatch.setattr(torch.nn.functional, "linear", slanted)
    assert not steady_linears(torch.nn.Linear(8, 8), 16, Patches())


def test_a_kernel_of_few_sequences_is_used_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.linear

    def by_count(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return real(x, weight, bias) + len(x) * 1e-7

    monkeypatch.setattr(torch.nn.functional, "linear", by_count)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    patches = Patches()
    assert steady_linears(model, 32, patches)
    assert "forward" in vars(model[0])
    patches.close()
    assert "forward" not in vars(model[0])
