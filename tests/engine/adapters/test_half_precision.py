"""Adapters over a base in bfloat16: as near to float32 as PEFT alone, and no farther than merged weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.adapters.lora_file import read_lora
from deployments.engine.adapters.table import AdapterTable
from deployments.engine.model.forward import Forward
from deployments.engine.verify.row_probe import watch_modules
from tests.adapters.lora import merged, unmerged, write_adapter
from tests.tiny import llama

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEQUENCES, LENGTH = 16, 128

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def ids() -> Tensor:
    """2,048 positions, the same tokens for all."""
    return torch.randint(9, 150, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(2))


def continued(model: Any, ids: Tensor) -> Tensor:
    """Sequences as long, of which only the first tokens are given: a model's own greedy answers."""
    answers: Tensor = model.generate(
        ids[:, :8],
        attention_mask=torch.ones_like(ids[:, :8]),
        min_new_tokens=LENGTH - 8,
        max_new_tokens=LENGTH - 8,
        do_sample=False,
        pad_token_id=0,
    )
    return answers


def distance(found: Tensor, reference: Tensor) -> float:
    return float((found.float() - reference).norm() / reference.norm())


def agreement(found: Tensor, reference: Tensor) -> float:
    return float((found.argmax(-1) == reference.argmax(-1)).float().mean())


def test_mixed_rows_are_as_near_to_float32_as_each_alone(ids: Tensor, tmp_path: Path) -> None:
    """At the answers of each adapter in float32."""
    folders = [write_adapter(llama(), tmp_path / f"a{i}", LINEARS, seed=i, rank=2 + i, size=0.1) for i in range(4)]
    base = llama().bfloat16()
    forward = Forward(base)
    table = AdapterTable(base, watch=partial(watch_modules, forward, groups=True))
    for folder in folders:
        table.add(folder.name, table.fit(read_lora(folder)))
    keys = [folders[i % 4].name for i in range(SEQUENCES)]
    exact = [merged(llama(), folder, lambda _: 2.0) for folder in folders]
    with torch.inference_mode():
        ids = torch.stack([continued(model, ids[i::4]) for i, model in enumerate(exact)], 1).flatten(0, 1)
        with table.applied(keys):
            mixed = base(ids).logits
        for i, folder in enumerate(folders):
            own = ids[i::4]
            reference = exact[i](own).logits
            half = merged(llama().bfloat16(), folder, lambda _: 2.0)(own).logits
            with unmerged(base, folder) as alone:
                as_peft = alone(own).logits
            assert agreement(mixed[i::4], reference) >= agreement(as_peft, reference) - 0.01
            assert distance(mixed[i::4], reference) <= 1.05 * distance(half, reference)


def test_bits_of_a_row_are_those_it_has_beside_others_of_its_adapter(ids: Tensor, tmp_path: Path) -> None:
    """A decode step of sequences of several adapters, and of one adapter, in batches of the same size."""
    folders = [write_adapter(llama(), tmp_path / f"a{i}", LINEARS, seed=i, rank=4) for i in range(2)]
    base: Any = llama().bfloat16()
    table = AdapterTable(base, row_by_row=True)
    for folder in folders:
        table.add(folder.name, table.fit(read_lora(folder)))
    with torch.inference_mode():
        with table.applied(["a0", "a1"] * 4):
            mixed = base(ids[:8]).logits
        with table.applied(["a0"] * 8):
            same = base(ids[:8]).logits
    assert torch.equal(mixed[::2], same[::2])
