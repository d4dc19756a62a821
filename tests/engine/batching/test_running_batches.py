"""Which rows share a batch, and which pause while memory is short."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deployments.core.calls import SamplingParams
from deployments.core.events import Delta, EngineEvent
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.batching.memory import can_all_finish
from deployments.engine.cache.sequence_bytes import SequenceBytes
from tests.engine.architectures import decoder
from tests.engine.running import generate_alone, prompt, row_engine

TOKENS = 200


class Stepped:
    """An engine whose steps the test makes itself."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.engine: BatchingEngine = row_engine(model, **options)
        self.engine.close()
        self.loop = self.engine._loop
        self.texts: dict[str, list[int]] = {}

    def add(self, name: str, ids: list[int], max_tokens: int) -> None:
        tokens = self.texts[name] = []

        def emit(event: EngineEvent) -> None:
            assert isinstance(event, Delta), event
            tokens.extend(event.token_ids)

        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = EngineRequest(request_id=name, input_ids=ids, sampling=sampling)
        self.loop.add(self.engine._sequence(request, emit))


def test_rows_that_may_grow_large_start_together_and_pause_when_they_do() -> None:
    """Memory for three full rows: all five run at first, none is computed twice, every text is right."""
    model = decoder("llama")
    prompts = [prompt(i, 20) for i in range(5)]
    stepped = Stepped(model, max_batch_size=8, prefix_cache=False)
    row = stepped.loop.batches.sequence_bytes.of_sequence(20 + TOKENS)
    limits = stepped.loop.limits
    object.__setattr__(limits, "budget", 3 * row)
    object.__setattr__(limits, "growth", 16)
    for i, ids in enumerate(prompts):
        stepped.add(str(i), ids, TOKENS)
    together = paused = 0
    with torch.inference_mode():
        while not stepped.loop.idle:
            stepped.loop.step()
            stats = stepped.loop.stats()
            together = max(together, stats.rows - stepped.loop.batches.paused)
            paused = max(paused, stepped.loop.batches.paused)
            assert stats.cache_bytes <= limits.budget
    assert together > 3
    assert paused > 0
    assert stepped.loop.stats().prompt_tokens == sum(map(len, prompts))
    for i, ids in enumerate(prompts):
        assert stepped.texts[str(i)] == generate_alone(model, ids, TOKENS).token_ids


def test_rows_of_very_different_lengths_decode_apart_until_padding_is_cheaper() -> None:
    stepped = Stepped(decoder("llama"), max_batch_size=8, prefix_cache=False, prefill_chunk=512)
    read = stepped.loop.batches.sequence_bytes.read
    object.__setattr__(stepped.loop.limits, "split_bytes", 3 * (read(300) - read(10)))
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
    assert stepped.texts["long"] == generate_alone(stepped.engine._forward.model, prompt(0, 300), 40).token_ids


@pytest.mark.parametrize(
    ("budget", "rows", "safe"),
    [(10, [(4, 10), (2, 6)], False), (12, [(4, 10), (2, 6)], True), (10, [], True), (10, [(5, 5), (5, 10)], True)],
)
def test_can_all_finish(budget: int, rows: list[tuple[int, int]], safe: bool) -> None:
    assert can_all_finish(budget, rows) is safe


def test_row_bytes() -> None:
    sizes = SequenceBytes(columns=((100, None), (10, 15)), states=7)
    assert sizes.read(10) == 1100
    assert sizes.read(100) == 100 * 100 + 10 * 15
    assert sizes.of_sequence(100) == 100 * 192 + 10 * 96 + 7
