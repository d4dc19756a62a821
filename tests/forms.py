"""Which parameters of a check the suite runs, and which `-m long` runs beside them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def forms(name: str, short: Any, *long: Any) -> pytest.MarkDecorator:
    """A check in a short form, which the suite runs, and in long ones."""
    first = pytest.param(short, id=_id(short, "short"))
    return pytest.mark.parametrize(
        name, [first, *(pytest.param(each, id=_id(each, "long"), marks=pytest.mark.long) for each in long)]
    )


def _id(value: Any, form: str) -> str | None:
    return None if isinstance(value, str | int | float) else form


def some(name: str, values: Iterable[Any], short: Collection[Any]) -> pytest.MarkDecorator:
    """Values of which the suite runs those in `short`."""
    marks = {True: (), False: pytest.mark.long}
    return pytest.mark.parametrize(name, [pytest.param(each, marks=marks[each in short]) for each in values])


def covering(*axes: tuple[str, Iterable[Any]], meet: int = 2, fixtures: Sequence[str] = ()) -> pytest.MarkDecorator:
    """A product of parameters, of which the suite runs a part.

    Args:
        axes: the name and the values of each parameter.
        meet: of how many parameters the values meet in every combination; 1 has each value once.
        fixtures: the names that are fixtures, which take the values.
    """
    names, values = zip(*((name, list(given)) for name, given in axes), strict=True)
    product = list(itertools.product(*(range(len(given)) for given in values)))
    part = _covering(product, meet)
    params = [
        pytest.param(
            *(given[i] for given, i in zip(values, place, strict=True)),
            marks=() if place in part else pytest.mark.long,
        )
        for place in product
    ]
    return pytest.mark.parametrize(names, params, indirect=fixtures)


def _covering(product: Sequence[tuple[int, ...]], meet: int) -> set[tuple[int, ...]]:
    """Places of which each adds the most combinations that none before it has; the first of equal ones."""

    def combinations(place: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(place), meet))

    missing = set().union(*map(combinations, product))
    part: set[tuple[int, ...]] = set()
    while missing:
        best = max(product, key=lambda place: len(combinations(place) & missing))
        part.add(best)
        missing -= combinations(best)
    return part
