"""Whose turn is next, without an engine."""

from __future__ import annotations

from deployments.core.calls import Turn
from deployments.engine.base.turns import PATIENCE, TurnQueue


class Queue(TurnQueue[str]):
    """Items are names."""

    def put(self, *names: str, priority: int = 0, client: str = "", group: str = "") -> None:
        for name in names:
            self.add(name, Turn(priority=priority, client=client, group=group))

    def taken(self, count: int | None = None) -> list[str]:
        """Let items begin, one after the other."""
        order = []
        while self and (count is None or len(order) < count):
            order.append(next(iter(self)))
            self.begin(order[-1])
        return order


def numbered(name: str, count: int) -> list[str]:
    return [f"{name}{i}" for i in range(count)]


def test_a_lower_priority_begins_first_and_equal_ones_in_the_order_of_arrival() -> None:
    queue = Queue()
    for name, priority in (("later", 3), ("plain", 0), ("first", -1), ("also plain", 0)):
        queue.put(name, priority=priority)
    assert list(queue) == ["first", "plain", "also plain", "later"]
    assert queue.taken() == ["first", "plain", "also plain", "later"]


def test_one_request_waits_for_one_turn_of_a_client_with_four_hundred() -> None:
    queue = Queue()
    many = numbered("a", 400)
    queue.put(*many, client="a")
    assert queue.taken(3) == many[:3]
    queue.put("b", client="b")
    assert queue.taken() == [many[3], "b", *many[4:]]


def test_clients_take_turns_and_iterating_gives_the_order_that_comes() -> None:
    queue = Queue()
    queue.put("a0", "a1", "a2", client="a")
    queue.put("b0", "b1", client="b")
    queue.put("c0", client="c")
    expected = ["a0", "b0", "c0", "a1", "b1", "a2"]
    assert list(queue) == expected
    assert queue.taken() == expected
    assert len(queue) == 0


def test_the_choices_of_a_turn_stay_together_and_late_ones_come_next() -> None:
    queue = Queue()
    queue.put("a0", "a1", client="a", group="a")
    queue.put("b0", client="b")
    assert queue.taken(1) == ["a0"]
    queue.put("a2", client="a", group="a")
    assert queue.taken() == ["a1", "a2", "b0"]


def test_what_is_passed_often_enough_is_next_and_as_urgent_as_those_that_passed() -> None:
    queue = Queue()
    queue.put("old", priority=9)
    taken = []
    for name in numbered("new", PATIENCE + 2):
        queue.put(name)
        assert queue.priority("old", 9) == (0 if len(taken) == PATIENCE else 9)
        taken += queue.taken(1)
    assert taken.index("old") == PATIENCE


def test_what_leaves_without_its_turn_delays_nobody() -> None:
    queue = Queue()
    queue.put("old", priority=9)
    many = numbered("a", 5)
    queue.put(*many, client="a")
    for name in (many[0], many[2], "old", "nobody"):
        queue.discard(name)
    queue.put("b0", client="b")
    assert queue.taken() == ["a1", "b0", "a3", "a4"]


def test_what_begins_again_is_first_of_all_or_of_its_client() -> None:
    queue = Queue()
    queue.put("a0", "a1", client="a")
    queue.put("low", priority=1)
    queue.taken(1)
    queue.add_again("a0", Turn(client="a", group="g"), 1)
    assert list(queue) == ["a0", "a1", "low"]
    queue.add_first(["low", "other"])
    assert list(queue) == ["low", "other", "a0", "a1"]
    queue.clear()
    assert not list(queue)
