"""Prompts that begin like earlier ones are not computed again, and the text is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.batching.prefix_cache import Prefix, PrefixStore
from deployments.engine.batching.sequence import common_prefix
from deployments.engine.cache.cache import BatchCache, new_cache
from tests.engine.architectures import VISION, decoder
from tests.engine.running import generate_alone, prompt, running, submit
from tests.forms import some

TOKENS = 10


def turns(engine: BatchingEngine, model: Any, count: int) -> list[int]:
    """A conversation that grows by its answers; how many tokens of each prompt were reused."""
    ids, cached = prompt(0, 40), []
    for turn in range(count):
        answer = submit(engine, ids, TOKENS).wait()
        assert answer.token_ids == generate_alone(model, ids, TOKENS).token_ids
        cached.append(answer.cached_tokens)
        ids = [*ids, *answer.token_ids, *prompt(turn + 1, 20)]
    return cached


@some(
    "kind",
    ("llama", "gemma3_text", "deepseek_v3", "llama4_text", "mamba2", "qwen3_next", "falcon_h1", "lfm2"),
    ("llama", "gemma3_text", "deepseek_v3", "qwen3_next"),
)
def test_a_conversation_reuses_all_of_its_last_turn(kind: str) -> None:
    """The last token of an answer is the only one that is not in its cache."""
    model = decoder(kind)
    with running(model, prefill_chunk=16) as engine:
        cached = turns(engine, model, 5)
        assert cached == [0, *(40 + 30 * turn - 21 for turn in range(1, 5))]
        assert engine.stats().cached_tokens == sum(cached)


def test_off_switch() -> None:
    model = decoder("llama")
    with running(model, prefix_cache=False) as engine:
        assert turns(engine, model, 3) == [0, 0, 0]
        assert engine.stats().prefix_entries == 0


@pytest.mark.parametrize(("kind", "reused"), [("llama", 60), ("mamba2", 0), ("mistral", 0)])
def test_a_prefix_is_cut_where_the_cache_allows_it(kind: str, reused: int) -> None:
    """A window that has slid on, or a state, cannot be taken back."""
    model = decoder(kind)
    shared = prompt(0, 60)
    with running(model) as engine:
        for seed in (1, 2):
            ids = [*shared, 3 + seed, *prompt(seed, 15)]
            answer = submit(engine, ids, TOKENS).wait()
            assert answer.token_ids == generate_alone(model, ids, TOKENS).token_ids
        assert answer.cached_tokens == reused


@pytest.mark.parametrize("kind", ["llama", "mamba2", "gemma3_text"])
def test_choices_of_one_prompt_compute_it_once(kind: str) -> None:
    model = decoder(kind)
    ids = prompt(0, 120)
    with running(model) as engine:
        answers = [submit(engine, ids, TOKENS, temperature=1.0, seed=seed) for seed in range(6)]
        texts = {tuple(answer.wait().token_ids) for answer in answers}
        assert len(texts) > 1
        stats = engine.stats()
        assert stats.prompt_tokens - stats.cached_tokens <= 120 + 5
        again = submit(engine, ids, TOKENS, temperature=1.0, seed=3).wait()
        assert again.token_ids == answers[3].token_ids


def test_a_running_sequence_lends_its_beginning() -> None:
    model = decoder("llama")
    shared = prompt(0, 80)
    with running(model) as engine:
        first = submit(engine, shared, 300, on_delta=lambda answer: None)
        while len(first.deltas) < 3:
            pass
        ids = [*shared, *prompt(1, 10)]
        answer = submit(engine, ids, TOKENS).wait()
        assert not first.done.is_set()
        assert answer.cached_tokens == 80
        assert answer.token_ids == generate_alone(model, ids, TOKENS).token_ids


def test_many_prompts_behind_one_prefix_go_together() -> None:
    model = decoder("llama")
    shared = prompt(0, 100)
    prompts = [[*shared, *prompt(i, 5 + 3 * i)] for i in range(1, 7)]
    with running(model, prefill_chunk=64) as engine:
        answers = [submit(engine, ids, TOKENS) for ids in prompts]
        for ids, answer in zip(prompts, answers, strict=True):
            assert answer.wait().token_ids == generate_alone(model, ids, TOKENS).token_ids
        assert sum(answer.cached_tokens > 50 for answer in answers) == 5


def test_images_are_never_confused() -> None:
    build, image, media = VISION["llava"]
    model = build()
    ids = [*prompt(0, 20), *image, *prompt(1, 20)]
    with running(model) as engine:
        for seed in (1, 2, 1):
            inputs = media(ids, seed)
            answer = submit(engine, ids, TOKENS, inputs=inputs, content_key=f"image {seed}").wait()
            assert answer.token_ids == generate_alone(model, ids, TOKENS, **inputs).token_ids
        assert answer.cached_tokens == len(ids) - 1


def test_bytes_are_bounded_and_the_oldest_goes_first() -> None:
    model = decoder("llama")
    prompts = [prompt(i, 60) for i in range(8)]
    with running(model, prefix_cache_gib=0.0002) as engine:
        for ids in prompts:
            submit(engine, ids, TOKENS).wait()
            assert engine.stats().prefix_bytes <= 0.0002 * (1 << 30)
        assert 0 < engine.stats().prefix_entries < 8
        assert submit(engine, prompts[0], TOKENS).wait().cached_tokens == 0
        assert submit(engine, prompts[-1], TOKENS).wait().cached_tokens == 59


def entry(ids: list[int], content_key: str = "") -> Prefix:
    cache = new_cache(decoder("llama", num_hidden_layers=1), capacity=len(ids))
    assert isinstance(cache, BatchCache)
    states = torch.zeros(1, 2, len(ids), 16)
    cache.update(states, states, 0)
    cache.added([len(ids)])
    return Prefix(ids=ids, cache=cache, offset=(0,), content_key=content_key)


def test_store_prefers_the_longest_and_replaces_what_is_contained() -> None:
    store = PrefixStore(1 << 20)
    short, long, other = entry([1, 2, 3]), entry([1, 2, 3, 4, 5]), entry([1, 2, 9, 9], content_key="x")
    store.add(short)
    store.add(other)
    assert store.find([1, 2, 3, 4], "") == (short, 3)
    store.add(long)
    assert len(store) == 2
    assert store.find([1, 2, 3, 4, 5, 6], "") == (long, 5)
    assert store.find([1, 2, 3], "") == (long, 2)
    assert store.find([1, 2, 9, 9, 9], "") == (long, 2)
    assert store.find([1, 2, 9, 9, 9], "x") == (other, 4)
    assert store.find([7], "") == (None, 0)
    assert store.nbytes == long.nbytes + other.nbytes
    store.shrink(other.nbytes)
    assert store.find([1, 2, 9, 9, 9], "x") == (other, 4)
    store.clear()
    assert (len(store), store.nbytes) == (0, 0)


@pytest.mark.parametrize("common", [0, 1, 2, 7, 8, 9])
def test_common_prefix(common: int) -> None:
    a = list(range(9))
    assert common_prefix(a, [*a[:common], 99, 98]) == common
    assert common_prefix([*a[:common], 99, 98], a) == common
