"""How often prompts are compared, and what is computed twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from deployments.engine.batching.prefix_cache import Prefix
from tests.engine.architectures import decoder
from tests.engine.running import generate_alone, prompt
from tests.engine.stepped import Stepped

CHUNK = 16


class Counted(Stepped):
    """Counts the tokens that are computed."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, prefill_chunk=CHUNK)
        self.computed = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: Any) -> None:
        self.computed += args[0].numel()


@pytest.mark.parametrize("kind", ["others", "same"])
def test_a_waiting_prompt_is_matched_when_something_has_changed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is computed in 30 steps, while twelve others wait, each as long, or the same."""
    model = decoder("llama")
    stepped = Counted(model)
    stepped.add("kept", prompt(99, 40))
    stepped.run()
    matches: Counter[int] = Counter()
    usable = Prefix.usable

    def counted(self: Prefix, ids: Any, *args: Any) -> int:
        matches[id(ids)] += 1
        return usable(self, ids, *args)

    monkeypatch.setattr(Prefix, "usable", counted)
    first = prompt(0, 30 * CHUNK)
    prompts = [first, *([*first, i] if kind == "same" else prompt(i, 30 * CHUNK) for i in range(3, 15))]
    for i, ids in enumerate(prompts):
        stepped.add(str(i), ids)
    with torch.inference_mode():
        for _ in range(25):
            stepped.loop.step()
    assert stepped.loop.stats().waiting == 12
    assert max(matches.values()) == 1
    stepped.run()
    for i, ids in enumerate(prompts):
        assert stepped.texts[str(i)] == generate_alone(model, ids, 2).token_ids


@pytest.mark.parametrize("leaves", [0, 1, 2])
@pytest.mark.parametrize("kept", [True, False])
def test_a_cancelled_sequence_leaves_the_others_of_its_group_what_they_have(leaves: int, kept: bool) -> None:
    """A group that begins from a kept prefix waits for its forward; the prefix is gone before that."""
    model = decoder("llama")
    stepped = Counted(model)
    common = prompt(1, 40) if kept else []
    if kept:
        stepped.add("first", common, 1)
        stepped.run()
    if stepped.loop.stats().steps % 2 == 1:
        stepped.add("one more step", prompt(2, 5), 1)
        stepped.run()
    prompts = {str(i): [*common, *prompt(10 + i, 8)] for i in range(3)}
    stepped.add("long", prompt(3, 12 * CHUNK))
    with torch.inference_mode():
        stepped.loop.step()
        for name, ids in prompts.items():
            stepped.add(name, ids, 4)
        stepped.loop.step()
    assert [len(prefill.sequences) for prefill in stepped.loop.scheduler.prefills] == [1, 3], "they wait for a step"
    stepped.loop.store.clear()
    stepped.cancel(str(leaves))
    assert [len(prefill.sequences) for prefill in stepped.loop.scheduler.prefills] == [1, 2]
    before = stepped.computed
    with torch.inference_mode():
        stepped.loop.step()
    # What the two lack, with the first decode step of both.
    assert stepped.computed - before == 2 * 8 + 2
    stepped.run()
    assert stepped.texts.pop(str(leaves)) == []
    for name, ids in prompts.items():
        if name in stepped.texts:
            assert stepped.texts[name] == generate_alone(model, ids, 4).token_ids
