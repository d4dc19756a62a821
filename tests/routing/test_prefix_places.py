"""Where prompts with a beginning went."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from deployments.routing.prefix_places import PrefixPlaces


def test_the_longest_known_beginning_counts() -> None:
    places: PrefixPlaces[str] = PrefixPlaces()
    places.note(["a", "b"], "r1")
    places.note(["a", "c"], "r2")
    places.note(["a"], "r1")
    assert places.longest(["a", "b", "d"]) == ["r1"]
    assert places.longest(["a", "x"]) == ["r1", "r2"]
    assert places.longest(["x"]) == places.longest([]) == []


def test_the_least_recently_used_beginnings_are_forgotten_first() -> None:
    places: PrefixPlaces[str] = PrefixPlaces(limit=100)
    for number in range(1000):
        places.note(["examples", str(number)], "r1")
        assert len(places) <= 100
    assert places.longest(["examples"]) == ["r1"]
    assert places.longest(["1"]) == []


def test_places_that_are_gone_are_forgotten() -> None:
    places: PrefixPlaces[str] = PrefixPlaces()
    places.note(["a"], "r1")
    places.note(["a", "b"], "r2")
    places.keep_only({"r1"})
    assert places.longest(["a", "b"]) == ["r1"]
    assert len(places) == 1


def test_a_place_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("deployments.routing.prefix_places.time", SimpleNamespace(monotonic=lambda: now[0]))
    places: PrefixPlaces[str] = PrefixPlaces(lifetime_s=60.0)
    places.note(["a"], "r1")
    now[0] += 50
    places.note(["a"], "r2")
    now[0] += 20
    assert places.longest(["a"]) == ["r2"]
