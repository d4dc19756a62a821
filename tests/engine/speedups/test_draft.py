from __future__ import annotations

from deployments.engine.speedups.draft import Drafter


def test_what_followed_the_last_time() -> None:
    drafter = Drafter()
    assert drafter.draft([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert drafter.draft([1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3], 8) == [9, 1, 2, 3]


def test_nothing_where_nothing_repeats() -> None:
    drafter = Drafter()
    assert drafter.draft([1, 2], 4) == []
    assert drafter.draft([1, 2, 3, 4, 5, 6], 4) == []
    assert drafter.draft([1, 2, 3, 4, 5, 6, 2, 3], 4) == []


def test_a_text_that_only_seems_to_repeat_itself_is_left_alone_for_a_while() -> None:
    drafter = Drafter()
    ids = [1, 2, 3, 4] * 10
    for _ in range(6):
        assert drafter.draft(ids, 2) == [1, 2]
        drafter.learn(0, len(ids))
    assert drafter.draft(ids, 2) == []
    assert drafter.draft(ids * 2, 2) == [1, 2]
    for _ in range(20):
        drafter.learn(3, len(ids) * 2)
    assert drafter.draft(ids * 2, 2) == [1, 2]
