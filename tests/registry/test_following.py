"""An ingress whose registry is away, or tells of models that come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from deployments.config.app import parse_args
from deployments.config.sources import Spec, spec_like
from deployments.core.errors import ModelNotFound, Unavailable
from deployments.registry.catalogue import Catalogue
from deployments.registry.following import Following
from deployments.registry.registry import Changes
from tests.in_loop import in_loop

ARGS = parse_args({"models": [{"id": "base", "loader": "x:y", "aliases": ["b"]}]})


def spec(name: str, source: str = "/a", **fields: Any) -> Spec:
    given = {"name": name, "source": source, "origin": "post", "created": 7, **fields}
    return spec_like(ARGS.models[0], "model_name", **given)


class Scripted:
    """A registry with the models of `specs`; None is away."""

    def __init__(self, specs: list[Spec] | None) -> None:
        self.specs = specs
        self.asked: list[str] = []
        self._changed = asyncio.Event()

    def become(self, specs: list[Spec] | None) -> None:
        self.specs = specs
        self._changed.set()
        self._changed = asyncio.Event()

    def _known(self) -> list[Spec]:
        if self.specs is None:
            raise Unavailable("away")
        return self.specs

    async def find(self, name: str) -> Spec | None:
        self.asked.append(name)
        return next((each for each in self._known() if name in each.entry.names), None)

    async def changes(self, seen: str, limit: float) -> Changes:
        if seen:
            await self._changed.wait()
        return "token", self._known()

    async def check(self, body: Mapping[str, Any]) -> Spec | None:
        raise NotImplementedError

    async def add(self, body: Mapping[str, Any]) -> tuple[Spec, bool]:
        raise NotImplementedError

    async def remove(self, name: str) -> Spec:
        raise NotImplementedError

    async def refresh(self) -> None:
        raise NotImplementedError

    async def states(self) -> list[dict[str, Any]]:
        raise NotImplementedError


def names(catalogue: Catalogue) -> list[str]:
    return [card.id for card in catalogue.models()]


async def until(catalogue: Catalogue, expected: list[str]) -> None:
    for _ in range(10_000):
        if names(catalogue) == expected:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(names(catalogue))


@in_loop
async def test_models_come_and_go() -> None:
    catalogue, registry = Catalogue(ARGS), Scripted([spec("one", aliases=["1"])])
    following = Following(catalogue, registry)
    with pytest.raises(Unavailable, match="searching its folders"):
        following.check()
    following.start()
    await until(catalogue, ["base", "one"])
    following.check()
    assert catalogue.resolve("1").created == 7
    registry.become([spec("two"), spec("one", aliases=["uno"])])
    await until(catalogue, ["base", "two", "one"])
    assert catalogue.resolve("uno").id == "one"
    with pytest.raises(ModelNotFound):
        catalogue.resolve("1")
    registry.become([])
    await until(catalogue, ["base"])
    with pytest.raises(ModelNotFound):
        catalogue.resolve("one")
    await following.close()


@in_loop
async def test_a_registry_that_is_away() -> None:
    """What is known stays; what is not known may exist, which is not a 404."""
    catalogue, registry = Catalogue(ARGS), Scripted([spec("one")])
    following = Following(catalogue, registry)
    following.start()
    await until(catalogue, ["base", "one"])
    registry.become(None)
    with pytest.raises(Unavailable):
        await following.discover("two")
    assert names(catalogue) == ["base", "one"]
    registry.become([spec("one"), spec("two")])
    assert await following.discover("two")
    assert catalogue.resolve("two").id == "two"
    await following.close()


@in_loop
async def test_a_name_that_does_not_exist_is_not_asked_for_again_at_once() -> None:
    registry = Scripted([])
    following = Following(Catalogue(ARGS), registry)
    assert [await following.discover("typo") for _ in range(3)] == [False] * 3
    assert registry.asked == ["typo"]


def test_a_name_of_the_configuration_is_never_another_model() -> None:
    catalogue = Catalogue(ARGS)
    catalogue.follow([spec("base"), spec("other", aliases=["b"])])
    assert names(catalogue) == ["base"]
    assert catalogue.resolve("b").id == "base"


@in_loop
async def test_other_options_are_another_version() -> None:
    catalogue = Catalogue(ARGS)
    catalogue.adopt(spec("one", source="org/name"))
    first = await catalogue.version("one")
    catalogue.adopt(spec("one", source="org/name"))
    assert await catalogue.version("one") is first
    catalogue.adopt(spec("one", source="org/other"))
    assert (await catalogue.version("one")).key != first.key
