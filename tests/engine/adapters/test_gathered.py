"""The matrices of several sequences together, against those of each by itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from deployments.engine.adapters.gathered import MOST_ROWS, Gathered, SideBySide, StackedRows, gather
from deployments.engine.adapters.lora import Lora

INPUTS, OUTPUTS, TOKENS = 12, 7, 3
MANY = MOST_ROWS + 4


def lora(seed: int, rank: int, *, bias: bool = False) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in ((INPUTS, rank), (rank, OUTPUTS), (OUTPUTS,))]
    return Lora(made[0], made[1], made[2] if bias else None)


LORAS = {"a": lora(0, 2), "b": lora(1, 5), "c": lora(2, 3)}
BIASED = {**LORAS, "b": lora(1, 5, bias=True)}


def check(found: Gathered | None, loras: dict[str, Lora], keys: tuple[str, ...]) -> None:
    assert found is not None
    adapted = [i for i, key in enumerate(keys) if key in loras]
    assert found.rows is None if len(adapted) == len(keys) else found.rows.tolist() == adapted
    x = torch.randn(len(adapted), TOKENS, INPUTS)
    ids = torch.randint(INPUTS, (len(adapted), TOKENS))
    delta, embedded = (
        found.outer(found.projected(given, is_embedding=given is ids), slice(None)) for given in (x, ids)
    )
    for place, i in enumerate(adapted):
        own = loras[keys[i]]
        bias = 0 if own.bias is None else own.bias
        torch.testing.assert_close(delta[place], x[place] @ own.a @ own.b + bias)
        torch.testing.assert_close(embedded[place], functional.embedding(ids[place], own.a) @ own.b + bias)


@pytest.mark.parametrize("loras", [LORAS, BIASED], ids=["plain", "biased"])
@pytest.mark.parametrize("count", [3, MANY])
def test_each_sequence_has_its_own(count: int, loras: dict[str, Lora]) -> None:
    for cycle in (("a", "b", "c"), ("a", "", "b"), ("c",), ("", "other", "a", "c")):
        keys = tuple(cycle[i % len(cycle)] for i in range(count))
        check(gather(keys, loras), loras, keys)
    assert gather(("", "other"), loras) is None


@pytest.mark.parametrize("loras", [LORAS, BIASED], ids=["plain", "biased"])
def test_sequences_that_change(loras: dict[str, Lora]) -> None:
    few = StackedRows(("a", "b", "c"), loras)
    assert few.follow(("b", "b", "a"), loras)
    check(few, loras, ("b", "b", "a"))
    assert not few.follow(("a", "b"), loras)
    assert not few.follow(("a", "a", "c"), loras)  # of a smaller rank
    assert not few.follow(("a", "", "b"), loras)
    many = SideBySide(("a", "b") * MANY, loras)
    assert many.follow(("", "b", "a") * MANY, loras)
    check(many, loras, ("", "b", "a") * MANY)
    assert not many.follow(("a", "c") * MANY, loras)
    assert not many.follow(("a", "b"), loras)


def test_what_overflows_stays_with_its_sequence() -> None:
    loras = {"a": lora(0, 2), "huge": Lora(torch.full((INPUTS, 1), 3e38), torch.ones(1, OUTPUTS))}
    found = gather(("a", "huge") * MANY, loras)
    assert found is not None
    h = found.projected(torch.full((2 * MANY, 1, INPUTS), 10.0), is_embedding=False)
    delta = found.outer(h, slice(None))
    assert delta[::2].isfinite().all()
    assert not delta[1::2].isfinite().any()
