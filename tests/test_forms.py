"""The part of a product of parameters that the suite runs."""

from __future__ import annotations

import itertools

import pytest

from tests.forms import covering, forms, some

AXES = (("letter", "abcdef"), ("digit", "123"), ("sign", "+-"))


def parts(mark: pytest.MarkDecorator) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """What the suite runs, and what `-m long` runs."""
    _, params = mark.args
    found = [param if hasattr(param, "marks") else pytest.param(param) for param in params]
    return [p.values for p in found if not p.marks], [p.values for p in found if p.marks]


@pytest.mark.parametrize(("meet", "at_most"), [(1, 6), (2, 21), (3, 36)])
def test_combinations_meet(meet: int, at_most: int) -> None:
    short, long = parts(covering(*AXES, meet=meet))
    assert len(short) <= at_most
    assert len({*short, *long}) == len(short) + len(long) == 36
    for some_axes in itertools.combinations(range(3), meet):
        wanted = set(itertools.product(*(AXES[i][1] for i in some_axes)))
        assert {tuple(values[i] for i in some_axes) for values in short} == wanted


def test_the_others_are_long() -> None:
    assert parts(forms("count", 2, 10, 20)) == ([(2,)], [(10,), (20,)])
    assert parts(some("kind", "abc", "ac")) == ([("a",), ("c",)], [("b",)])
