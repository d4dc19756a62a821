"""Which sequences share a batch, and which pause while memory is short."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.batching.memory import can_all_finish
from deployments.engine.cache.sequence_bytes import SequenceBytes
from tests.engine.architectures import decoder
from tests.engine.running import generate_alone, prompt
from tests.engine.stepped import Stepped

TOKENS = 200


def test_sequences_that_may_grow_large_start_together_and_pause_when_they_do() -> None:
    """Memory for three full sequences: all five run at first, none is computed twice, every text is right."""
    model = decoder("llama")
    prompts = [prompt(i, 20) for i in range(5)]
    stepped = Stepped(
        model,
        limits=lambda sizes: {"budget": 3 * sizes.of_sequence(20 + TOKENS), "growth": 16},
        max_batch_size=8,
        prefix_cache=False,
    )
    for i, ids in enumerate(prompts):
        stepped.add(str(i), ids, TOKENS)
    together = paused = 0
    with torch.inference_mode():
        while not stepped.loop.idle:
            stepped.loop.step()
            stats = stepped.loop.stats()
            together = max(together, stats.sequences - stepped.loop.batches.paused)
            paused = max(paused, stepped.loop.batches.paused)
            assert stats.cache_bytes <= stepped.loop.limits.budget
    assert together > 3
    assert paused > 0
    assert stepped.loop.stats().prompt_tokens == sum(map(len, prompts))
    for i, ids in enumerate(prompts):
        assert stepped.texts[str(i)] == generate_alone(model, ids, TOKENS).token_ids


def test_sequences_of_very_different_lengths_decode_separately_until_padding_is_cheaper() -> None:
    model = decoder("llama")
    stepped = Stepped(
        model,
        limits=lambda sizes: {"split_bytes": 3 * (sizes.read(300) - sizes.read(10))},
        max_batch_size=8,
        prefix_cache=False,
        prefill_chunk=512,
    )
    stepped.add("long", prompt(0, 300), 40)
    for i in range(5):
        stepped.add(str(i), prompt(1 + i, 10), 40 if i < 2 else 5)
    seen = set()
    with torch.inference_mode():
        while not stepped.loop.idle:
            stepped.loop.step()
            seen.add(tuple(sorted(len(batch.sequences) for batch in stepped.loop.batches)))
    assert (1, 5) in seen
    assert (3,) in seen
    assert stepped.texts["long"] == generate_alone(model, prompt(0, 300), 40).token_ids


@pytest.mark.parametrize(
    ("budget", "rows", "safe"),
    [(10, [(4, 10), (2, 6)], False), (12, [(4, 10), (2, 6)], True), (10, [], True), (10, [(5, 5), (5, 10)], True)],
)
def test_can_all_finish(budget: int, rows: list[tuple[int, int]], safe: bool) -> None:
    assert can_all_finish(budget, rows) is safe


def test_sequence_bytes() -> None:
    sizes = SequenceBytes(columns=((100, None), (10, 15)), states=7)
    assert sizes.read(10) == 1100
    assert sizes.read(100) == 100 * 100 + 10 * 15
    assert sizes.of_sequence(100) == 100 * 192 + 10 * 96 + 7
