"""Leases: what is loaded, when, and for how long. Real event loops, values that count their own life."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest

from deployments.core.errors import ModelLoadFailed, TroupeError, Unavailable
from deployments.host.leases import Leases


class Model:
    def __init__(self, key: str) -> None:
        self.key = key
        self.users = 0
        self.unloaded = False


class Garage:
    """Loads and unloads `Model`s, slowly, and notes every fault that a lease must make impossible."""

    def __init__(self, capacity: int, *, seconds: float = 0.01, broken: tuple[str, ...] = (), **options: Any) -> None:
        self.loads: Counter[str] = Counter()
        self.uses: Counter[str] = Counter()
        self.faults: list[str] = []
        self.alive = 0
        self.capacity = capacity
        self._seconds = seconds
        self._broken = broken
        self.leases: Leases[Model] = Leases(self._load, self._unload, capacity=capacity, **options)

    async def _load(self, key: str) -> Model:
        self.loads[key] += 1
        self.alive += 1
        if self.alive > self.capacity:
            self.faults.append(f"{self.alive} models in {self.capacity} places")
        await asyncio.sleep(self._seconds)
        if key in self._broken:
            self.alive -= 1
            raise ModelLoadFailed(f"{key} is broken")
        return Model(key)

    async def _unload(self, key: str, model: Model) -> None:
        if model.users:
            self.faults.append(f"{key} unloaded while {model.users} use it")
        if model.unloaded:
            self.faults.append(f"{key} unloaded twice")
        model.unloaded = True
        await asyncio.sleep(self._seconds)
        self.alive -= 1

    async def use(self, key: str, seconds: float = 0.005, *, priority: int = 0) -> str:
        async with self.leases.lease(key, priority) as model:
            model.users += 1
            self.uses[key] += 1
            if model.unloaded:
                self.faults.append(f"{key} leased after it was unloaded")
            try:
                await asyncio.sleep(seconds)
            finally:
                model.users -= 1
            return model.key


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


def test_a_burst_for_one_cold_model_loads_it_once() -> None:
    async def main() -> None:
        garage = Garage(2)
        assert await asyncio.gather(*(garage.use("a") for _ in range(50))) == ["a"] * 50
        assert garage.loads == {"a": 1}

    run(main())


def test_the_least_recently_used_idle_model_makes_room() -> None:
    async def main() -> None:
        garage = Garage(2)
        for key in ("a", "b", "a", "c"):
            await garage.use(key)
        assert set(garage.leases.values()) == {"a", "c"}
        await garage.use("a")
        assert garage.loads == {"a": 1, "b": 1, "c": 1}

    run(main())


def test_a_busy_model_is_never_unloaded() -> None:
    async def main() -> None:
        garage = Garage(1, patience=0.02)
        async with garage.leases.lease("a") as model:
            waiting = asyncio.create_task(garage.use("b"))
            await asyncio.sleep(0.1)
            assert not model.unloaded
            assert not waiting.done()
        assert await waiting == "b"
        assert garage.faults == []

    run(main())


def test_steady_traffic_for_one_model_does_not_starve_another() -> None:
    async def main() -> None:
        garage = Garage(1, patience=0.05)
        stop = asyncio.Event()

        async def steady() -> int:
            served = 0
            while not stop.is_set():
                await garage.use("a")
                served += 1
            return served

        workers = [asyncio.create_task(steady()) for _ in range(8)]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(garage.use("b"), 2) == "b"
        await asyncio.sleep(0.1)
        stop.set()
        assert all(served > 2 for served in await asyncio.gather(*workers))
        assert garage.loads["b"] == 1
        assert garage.faults == []

    run(main())


def test_a_hundred_mixed_requests_over_three_models_in_two_places() -> None:
    async def main() -> None:
        garage = Garage(2, patience=0.02)
        keys = [random.Random(7).choice("abc") for _ in range(100)]
        assert await asyncio.gather(*(garage.use(key) for key in keys)) == keys
        assert garage.faults == []
        assert sum(garage.loads.values()) <= 4, "one load per model, and one per switch"

    run(main())


def test_a_failed_load_fails_all_who_wait_and_is_not_repeated_at_once() -> None:
    async def main() -> None:
        garage = Garage(1, broken=("x",), retry_after=lambda key: 0.1)
        results = await asyncio.gather(*(garage.use("x") for _ in range(10)), return_exceptions=True)
        assert all(isinstance(result, ModelLoadFailed) for result in results)
        with pytest.raises(ModelLoadFailed, match="x is broken"):
            await garage.use("x")
        assert garage.loads["x"] == 1
        assert await garage.use("a") == "a", "the broken model harms no other"
        await asyncio.sleep(0.12)
        with pytest.raises(ModelLoadFailed):
            await garage.use("x")
        assert garage.loads["x"] == 2

    run(main())


def test_waiters_of_a_failed_load_get_its_error_even_without_a_retry_pause() -> None:
    async def main() -> None:
        garage = Garage(1, broken=("x",), retry_after=lambda key: 0)
        results = await asyncio.gather(*(garage.use("x") for _ in range(5)), return_exceptions=True)
        assert all(isinstance(result, ModelLoadFailed) for result in results)
        assert garage.loads["x"] == 1

    run(main())


def test_a_waiter_that_gives_up_leaves_the_load_alone() -> None:
    async def main() -> None:
        garage = Garage(1, seconds=0.05)
        first = asyncio.create_task(garage.use("a"))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(garage.use("a"))
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second == "a"
        assert garage.loads == {"a": 1}

    run(main())


def test_an_error_that_is_not_ours_is_told_too() -> None:
    async def main() -> None:
        async def load(key: str) -> Model:
            raise ZeroDivisionError("no such thing")

        async def unload(key: str, model: Model) -> None: ...

        leases: Leases[Model] = Leases(load, unload, capacity=1)
        with pytest.raises(TroupeError, match="ZeroDivisionError: no such thing"):
            async with leases.lease("a"):
                pass

    run(main())


def test_pinned_models_stay() -> None:
    async def main() -> None:
        garage = Garage(2, patience=0.01)
        garage.leases.pin("a")
        for key in ("a", "b", "c", "d"):
            await garage.use(key)
        assert garage.loads["a"] == 1
        assert "a" in garage.leases.values()

    run(main())


def test_a_cancelled_eviction_unloads_all_the_same() -> None:
    async def main() -> None:
        garage = Garage(1)
        async with garage.leases.lease("a"):
            eviction = asyncio.create_task(garage.leases.evict("a"))
            await asyncio.sleep(0.01)
            eviction.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await eviction
        await garage.leases.close()
        assert garage.alive == 0
        assert not garage.faults

    asyncio.run(main())


def test_evict_waits_for_the_users() -> None:
    async def main() -> None:
        garage = Garage(2)
        using = asyncio.create_task(garage.use("a", seconds=0.1))
        await asyncio.sleep(0.05)
        assert await garage.leases.evict("a")
        assert using.done()
        assert not await garage.leases.evict("a")
        assert garage.faults == []

    run(main())


def test_close_ends_the_users_first_and_refuses_new_ones() -> None:
    async def main() -> None:
        garage = Garage(2)
        using = asyncio.create_task(garage.use("a", seconds=0.1))
        await asyncio.sleep(0.05)
        await garage.leases.close(5)
        assert await using == "a"
        assert garage.faults == []
        assert garage.alive == 0
        with pytest.raises(Unavailable):
            await garage.use("a")

    run(main())


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_with_cancellations(seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        garage = Garage(2, seconds=0.002, patience=0.01, broken=("x",), retry_after=lambda key: 0.01)

        async def client() -> None:
            await asyncio.sleep(rng.random() * 0.2)
            with contextlib.suppress(TimeoutError, ModelLoadFailed):
                key = rng.choice("abcdx")
                assert await asyncio.wait_for(garage.use(key, rng.random() * 0.02), rng.choice([0.01, 5])) == key

        await asyncio.gather(*(client() for _ in range(200)))
        await asyncio.sleep(0.1)
        stats = garage.leases.stats()
        assert garage.faults == []
        assert (stats.leases, stats.waiting, stats.loading) == (0, 0, ())
        await garage.leases.close()
        assert garage.alive == 0

    run(main())


def test_a_request_for_another_model_at_low_priority_lets_live_ones_keep_the_place() -> None:
    """One after the other, with pauses in which nobody uses the model."""

    async def main() -> None:
        garage = Garage(1, patience=0.2)
        line = None
        for _ in range(10):
            await garage.use("live")
            line = line or asyncio.create_task(garage.use("batch", priority=5))
            await asyncio.sleep(0.02)
        assert garage.loads == {"live": 1}
        assert await asyncio.wait_for(line, 2) == "batch", "after a pause of its patience"
        assert garage.faults == []

    run(main())


def test_what_is_less_urgent_has_its_turn_by_age_and_gives_the_place_back_at_once() -> None:
    async def main() -> None:
        garage = Garage(1, patience=0.02)
        stop = asyncio.Event()

        async def steady() -> None:
            while not stop.is_set():
                await garage.use("live")

        live = [asyncio.create_task(steady()) for _ in range(3)]
        await asyncio.sleep(0.1)
        begun = asyncio.get_running_loop().time()
        await asyncio.gather(*(garage.use("batch", priority=5) for _ in range(6)))
        assert asyncio.get_running_loop().time() - begun >= 32 * 0.02
        assert garage.loads == {"live": 1, "batch": 1}, "all that wait have one turn"
        more = asyncio.create_task(garage.use("batch", priority=5))
        await garage.use("live")
        assert not more.done()
        stop.set()
        await asyncio.gather(*live, more)
        assert garage.faults == []

    run(main())


def test_a_more_urgent_request_does_not_wait_out_its_patience() -> None:
    async def main() -> None:
        garage = Garage(1, patience=60)
        async with garage.leases.lease("batch", 5):
            live = asyncio.create_task(garage.use("live"))
            more = asyncio.create_task(garage.use("batch", priority=5))
            await asyncio.sleep(0.05)
            assert garage.uses == {}, "the model takes no more requests of the batch"
        assert await asyncio.wait_for(live, 2) == "live"
        garage.leases.retire("live")
        assert await asyncio.wait_for(more, 2) == "batch"
        assert garage.faults == []

    run(main())


def test_the_most_urgent_of_those_that_wait_is_next() -> None:
    async def main() -> None:
        garage = Garage(1, patience=0.05)
        order: list[str] = []

        async def use(key: str, priority: int) -> None:
            await garage.use(key, priority=priority)
            order.append(key)

        async with garage.leases.lease("held"):
            waiting = [asyncio.create_task(use(key, priority)) for key, priority in (("c", 9), ("b", 0), ("a", -9))]
            await asyncio.sleep(0.02)
        await asyncio.gather(*waiting)
        assert order == ["a", "b", "c"]

    run(main())
