"""Where requests go: the router's choices on replicas of known state."""

from __future__ import annotations

import asyncio
import gc
import random
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest

from deployments.router import LOST_AFTER_S, PLAN_LIFETIME_S, ModelAffinityRouter

pytestmark = pytest.mark.usefixtures("all_is_walked")


@dataclass(frozen=True)
class ReplicaName:
    unique_id: str


@dataclass
class Replica:
    """What the router reads of a `RunningReplica`."""

    replica_id: ReplicaName
    multiplexed_model_ids: set[str] = field(default_factory=set)


class Router(ModelAffinityRouter):
    """The real choices, over queue lengths that a test sets instead of Serve."""

    def __init__(self, queues: dict[ReplicaName, int], **options: Any) -> None:
        self.queues = queues
        self.initialize_state(**{"patience_s": 0.0, **options})

    @property
    def replica_queue_len_cache(self) -> Any:
        return self.queues


def fleet(count: int, **options: Any) -> tuple[Router, list[Replica]]:
    replicas = [Replica(ReplicaName(f"r{i}")) for i in range(count)]
    return Router({r.replica_id: 0 for r in replicas}, **options), replicas


def send(router: Router, replicas: list[Replica], model: str, session: str = "", blocks: Sequence[str] = ()) -> Replica:
    """Route a request as Serve does: to the least busy of the choice."""
    chosen = min(router.choose(replicas, model, session, blocks), key=lambda r: router.queues[r.replica_id])
    router.queues[chosen.replica_id] += 1
    return chosen


def loaded(replicas: list[Replica], name: ReplicaName, model: str) -> None:
    """Let a replica say that it has a model."""
    next(replica for replica in replicas if replica.replica_id == name).multiplexed_model_ids.add(model)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The router's time in seconds, which the test sets."""
    now = [1000.0]
    monkeypatch.setattr("deployments.router.time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0]))
    return now


def test_a_cold_burst_goes_to_one_replica_and_stays_there() -> None:
    router, replicas = fleet(4, full_at=100, patience_s=1.0)
    assert len({send(router, replicas, "a").replica_id for _ in range(50)}) == 1


def test_two_ingresses_agree_on_a_models_home() -> None:
    for model in "abcdefgh":
        homes = set()
        for _ in range(3):
            router, replicas = fleet(8)
            homes.add(send(router, replicas, model).replica_id)
        assert len(homes) == 1


def test_models_spread_over_replicas_with_room() -> None:
    router, replicas = fleet(8, max_models=1)
    assert len({send(router, replicas, model).replica_id for model in "abcdefgh"}) == 8


def test_a_hot_model_spreads_over_replicas_with_nothing_to_do() -> None:
    router, replicas = fleet(4, full_at=12)
    placed = Counter(send(router, replicas, "a").replica_id for _ in range(40))
    assert len(placed) == 4
    assert max(placed.values()) - min(placed.values()) <= 1


def test_a_model_with_little_to_do_does_not() -> None:
    router, replicas = fleet(4, full_at=12)
    assert len({send(router, replicas, "a").replica_id for _ in range(3)}) == 1


def test_nor_a_burst(clock: list[float]) -> None:
    router, replicas = fleet(4, full_at=10, patience_s=30.0)
    (first,) = {send(router, replicas, "a").replica_id for _ in range(100)}
    loaded(replicas, first, "a")
    clock[0] += 31
    (further,) = {send(router, replicas, "a").replica_id for _ in range(80)}
    assert further != first


def test_nor_one_that_had_a_pause(clock: list[float]) -> None:
    router, replicas = fleet(4, full_at=10, patience_s=30.0)
    (own,) = {send(router, replicas, "a").replica_id for _ in range(11)}
    loaded(replicas, own, "a")
    clock[0] += 31
    router.queues[own] = 1
    assert len({send(router, replicas, "a").replica_id for _ in range(20)}) == 1


def test_a_full_model_goes_to_a_free_place_with_less_to_do() -> None:
    router, replicas = fleet(2, full_at=10, max_models=2)
    for replica, model in zip(replicas, "ab", strict=True):
        replica.multiplexed_model_ids.add(model)
    router.queues[replicas[0].replica_id] = 12
    router.queues[replicas[1].replica_id] = 8
    assert send(router, replicas, "a") is replicas[0]
    router.queues[replicas[1].replica_id] = 2
    assert send(router, replicas, "a") is replicas[1]


def test_a_full_model_never_drives_out_one_in_use() -> None:
    router, replicas = fleet(2, full_at=10, max_models=1)
    for replica, model in zip(replicas, "ab", strict=True):
        replica.multiplexed_model_ids.add(model)
        router.queues[replica.replica_id] = 5
    assert {send(router, replicas, "a").replica_id for _ in range(100)} == {replicas[0].replica_id}


def test_but_it_takes_the_place_of_an_idle_one() -> None:
    router, replicas = fleet(2, full_at=10, max_models=1)
    for replica, model in zip(replicas, "ab", strict=True):
        replica.multiplexed_model_ids.add(model)
    assert {send(router, replicas, "a").replica_id for _ in range(20)} == {replicas[0].replica_id}
    assert send(router, replicas, "a") is replicas[1]


def test_a_conversation_stays_where_it_is_when_all_are_full() -> None:
    router, replicas = fleet(2, full_at=4, slack=3)
    for replica in replicas:
        replica.multiplexed_model_ids.add("a")
        router.queues[replica.replica_id] = 10
    own = send(router, replicas, "a", "talk")
    router.queues[own.replica_id] -= 1
    for _ in range(5):
        assert send(router, replicas, "a", "talk") is own
        router.queues[own.replica_id] -= 1


def test_a_conversation_stays_with_its_replica_until_that_is_full_and_much_busier() -> None:
    router, replicas = fleet(4, full_at=5, slack=3)
    for replica in replicas:
        replica.multiplexed_model_ids.add("a")
    own = send(router, replicas, "a", "talk")
    for _ in range(4):
        assert send(router, replicas, "a", "talk") is own
    assert send(router, replicas, "a", "talk") is not own
    router.queues[own.replica_id] = 4
    assert send(router, replicas, "a", "talk") is own


def test_conversations_are_spread_evenly() -> None:
    router, replicas = fleet(8, full_at=1000, slack=1000)
    for replica in replicas:
        replica.multiplexed_model_ids.add("a")
    placed = Counter(send(router, replicas, "a", f"talk {i}").replica_id for i in range(800))
    assert min(placed.values()) > 60


def test_a_conversation_moves_only_when_its_replica_is_gone() -> None:
    router, replicas = fleet(8, full_at=1000, slack=1000)
    for replica in replicas:
        replica.multiplexed_model_ids.add("a")
    sessions = [f"talk {i}" for i in range(200)]
    before = {s: send(router, replicas, "a", s).replica_id for s in sessions}
    left = replicas[1:]
    moved = [s for s in sessions if send(router, left, "a", s).replica_id != before[s]]
    assert all(before[s] == replicas[0].replica_id for s in moved)


EXAMPLES = ("e1", "e2", "e3")
"""How a prompt begins that has a question after many examples."""


def test_questions_after_the_same_examples_go_to_one_replica() -> None:
    router, replicas = warm_fleet(8)
    own = [send(*warm_fleet(8), "a", f"talk {i}").replica_id for i in range(40)]
    assert len(set(own[:20])) > 4
    placed = set()
    for i in range(20):
        chosen = send(router, replicas, "a", f"talk {i}", EXAMPLES)
        placed.add(chosen.replica_id)
        router.queues[chosen.replica_id] -= 1
    assert len(placed) == 1
    elsewhere = next(i for i in range(20, 40) if own[i] not in placed)
    assert send(router, replicas, "a", f"talk {elsewhere}", ("x",)).replica_id == own[elsewhere]


def test_prompts_without_a_conversation_go_where_their_beginning_is() -> None:
    router, replicas = warm_fleet(4)
    first = send(router, replicas, "a", "", EXAMPLES)
    assert send(router, replicas, "a", "", (*EXAMPLES, "e4")) is first
    assert send(router, replicas, "a", "", ("x",)) is not first


def test_examples_go_to_a_second_replica_if_the_first_is_busier() -> None:
    router, replicas = warm_fleet(4, full_at=100, prefix_slack=2)
    placed = Counter(send(router, replicas, "a", f"talk {i}", EXAMPLES).replica_id for i in range(200))
    assert len(placed) == 4
    assert max(placed.values()) < 75


def test_many_beginnings_are_spread_and_each_is_on_few_replicas() -> None:
    """57 prompts of examples, and questions after them from 128 clients, before caches that hold 16 of the 57."""

    def missing(routed: bool) -> tuple[int, int]:
        router, replicas = warm_fleet(8, full_at=32)
        kept: dict[ReplicaName, dict[int, None]] = {r.replica_id: {} for r in replicas}
        running: list[ReplicaName] = []
        chance, count, busiest = random.Random(1), 0, 0
        for number in range(1500):
            if len(running) == 128:
                router.queues[running.pop(chance.randrange(128))] -= 1
            examples = chance.randrange(57)
            blocks = (f"{examples}", f"{examples} question {number}") if routed else ()
            running.append(send(router, replicas, "a", f"talk {number}", blocks).replica_id)
            has = kept[running[-1]]
            count += examples not in has
            has.pop(examples, None)
            has[examples] = None
            if len(has) > 16:
                del has[next(iter(has))]
            busiest = max(busiest, max(router.queues.values()))
        return count, busiest

    (without, _), (with_blocks, busiest) = missing(False), missing(True)
    assert with_blocks < without / 3
    assert busiest <= 24


def test_a_conversation_stays_where_its_beginning_has_brought_it() -> None:
    router, replicas = warm_fleet(8)
    home = send(router, replicas, "a", "first", EXAMPLES)
    talk = next(t for t in map(str, range(99)) if send(*warm_fleet(8), "a", t).replica_id != home.replica_id)
    router.queues[home.replica_id] = 0
    assert send(router, replicas, "a", talk, EXAMPLES) is home
    router.queues[home.replica_id] = 10  # busier than the others, but not full
    for i in range(20):  # others bring the examples to further replicas
        send(router, replicas, "a", f"other {i}", EXAMPLES)
    assert send(router, replicas, "a", talk, (*EXAMPLES, "turn 2")) is home


def test_a_beginning_is_not_looked_for_on_a_replica_that_is_gone() -> None:
    router, replicas = warm_fleet(4)
    home = send(router, replicas, "a", "first", EXAMPLES)
    left = [replica for replica in replicas if replica is not home]
    for i in range(20):
        talk = f"talk {i}"
        alone, others = warm_fleet(4)
        own = send(alone, [r for r in others if r.replica_id != home.replica_id], "a", talk)
        if i == 0:
            assert send(router, left, "a", talk, EXAMPLES).replica_id == own.replica_id
        assert send(router, left, "a", talk, EXAMPLES) in left


def warm_fleet(count: int, **options: Any) -> tuple[Router, list[Replica]]:
    """Replicas that have the model `a`."""
    router, replicas = fleet(count, **{"full_at": 1000, **options})
    for replica in replicas:
        replica.multiplexed_model_ids.add("a")
    return router, replicas


def test_a_choice_costs_in_proportion_to_the_replicas() -> None:
    def seconds(count: int) -> float:
        router, replicas = fleet(count, full_at=100)
        for replica in replicas:
            replica.multiplexed_model_ids.add("a")
        times = []
        for i in range(9):
            began = time.process_time()
            router.choose(replicas, "a", f"talk {i}")  # type: ignore[arg-type]
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(2000) < 40 * seconds(200)


def test_plans_are_forgotten(clock: list[float]) -> None:
    """A replica that was sent a model and never says that it has it is free for another after a while."""
    homes = {model: send(*fleet(2), model).replica_id for model in "abcdefgh"}
    first, second = next((a, b) for a in homes for b in homes if a < b and homes[a] == homes[b])
    router, replicas = fleet(2, max_models=1)
    home = send(router, replicas, first).replica_id
    assert send(router, replicas, second).replica_id != home
    router, replicas = fleet(2, max_models=1)
    send(router, replicas, first)
    clock[0] += PLAN_LIFETIME_S + 1
    assert send(router, replicas, second).replica_id == home


def test_an_exception_never_hangs_a_request() -> None:
    router, replicas = fleet(2)
    replicas[0].multiplexed_model_ids = None  # type: ignore[assignment]
    metadata = SimpleNamespace(multiplexed_model_id="a", session_id="")
    request = SimpleNamespace(metadata=metadata, created_at=float("inf"), routing_context=SimpleNamespace())
    assert asyncio.run(router.choose_replicas(replicas, request)) == [replicas]  # type: ignore[arg-type]
    assert request.routing_context.should_backoff


def test_a_request_is_lost_when_nobody_takes_it_and_not_when_it_came_long_ago(clock: list[float]) -> None:
    """Behind a burst, a request may wait for its first choice longer than that: any replica would load the model."""

    async def main() -> None:
        router, replicas = fleet(2)
        loaded(replicas, replicas[1].replica_id, "a")
        metadata = RequestMetadata(request_id="r", internal_request_id="i", multiplexed_model_id="a")
        request = PendingRequest(args=[], kwargs={}, metadata=metadata, created_at=0.0)
        for _ in range(2):
            router._add_pending_request_to_indices(request)
            assert await router.choose_replicas(replicas, request) == [[replicas[1]]]
            clock[0] += LOST_AFTER_S + 1
            assert await router.choose_replicas(replicas, request) == [replicas]
            router._remove_pending_request_from_indices(request)

    asyncio.run(main())


def test_calls_that_one_request_makes_at_once_are_told_apart() -> None:
    async def matched() -> None:
        router, _ = fleet(1)
        calls = [
            PendingRequest(args=[], kwargs={}, metadata=RequestMetadata(request_id="a", internal_request_id="a"))
            for _ in range(3)
        ]
        for call in calls:
            router._add_pending_request_to_indices(call)
        for call in reversed(calls):
            assert router._get_pending_request_matching_internal_request_id(call.metadata) is call
            call.future.set_result(None)
            assert router._get_pending_request_matching_internal_request_id(call.metadata) is None
            router._remove_pending_request_from_indices(call)
        kept = [weakref.ref(call) for call in calls]
        del call, calls
        gc.collect()
        assert not any(reference() for reference in kept)

    asyncio.run(matched())
