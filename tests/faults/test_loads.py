"""Many replicas, many models: loaded once, never driven out while used."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.clients import KEY, ask, replicas, total
from tests.faults.conftest import Say
from tests.faults.paced import cut_off, loads, model
from tests.serving import serving

API = {"api_keys": [KEY], "admin_keys": [KEY]}


A_GPU_EACH = {"num_gpus": 1, "num_cpus": 0.5}
Replicated = tuple[str, Path, int]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def replicated(
    request: pytest.FixtureRequest, cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replicated]:
    """Replicas that hold eight of many models together: their URL, what they write down of loads, their number."""
    log, count = tmp_path_factory.mktemp("loads"), request.param
    models = [model(name, log, seconds=0.5) for name in ("cold", "left", *(f"m{i}" for i in range(8)))]
    args = {"models": models, "max_models_per_replica": 8 // count, "swap_patience_s": 0.2, "api": API}
    with serving(cluster, args, num_replicas=count, ray_actor_options=A_GPU_EACH) as url:
        yield url, log, count


def check_gpus(url: str, count: int, say: Say) -> None:
    devices = sorted(str(replica["cuda_visible_devices"]) for replica in replicas(url))
    pids = {replica["pid"] for replica in replicas(url)}
    say(f"{count} replicas in {len(pids)} processes, CUDA_VISIBLE_DEVICES {', '.join(devices)}")
    assert len(set(devices)) == len(pids) == count
    assert set(devices) <= {str(i) for i in range(8)}


def test_gpus_get_a_replica_each(replicated: Replicated, say: Say) -> None:
    url, _, count = replicated
    check_gpus(url, count, say)


@pytest.mark.long
def test_eight_gpus_get_a_replica_each(cluster: str, say: Say) -> None:
    with serving(cluster, {"models": [model("a")], "api": API}, num_replicas=8, ray_actor_options=A_GPU_EACH) as url:
        check_gpus(url, 8, say)


def test_fifty_at_once_for_one_cold_model_load_it_once(replicated: Replicated, say: Say) -> None:
    url, log, count = replicated

    async def main() -> None:
        replies = await asyncio.gather(*(ask(url, "cold", f"q{i}", max_tokens=2) for i in range(50)))
        assert [reply.text for reply in replies] == [f"q{i} 0 q{i} 1 " for i in range(50)]
        say(f"50 requests on {count} replicas: {loads(log, 'cold')} load, all answered in {replies[-1].seconds:.1f} s")
        assert loads(log, "cold") == 1

    asyncio.run(main())


def test_a_client_that_leaves_while_its_model_loads_harms_nobody(replicated: Replicated, say: Say) -> None:
    url, log, _ = replicated

    async def main() -> None:
        busy = asyncio.create_task(ask(url, "cold", "busy", max_tokens=100, stream=True))
        leaving = asyncio.create_task(ask(url, "left", max_tokens=2))
        staying = asyncio.create_task(ask(url, "left", "stays", max_tokens=2))
        await asyncio.sleep(0.15)
        leaving.cancel()
        assert (await staying).text == "stays 0 stays 1 "
        assert (await busy).text == "".join(f"busy {i} " for i in range(100))
        say(f"{loads(log, 'left')} load; the one who stayed and a running stream were served in full")
        assert loads(log, "left") == 1

    asyncio.run(main())


def test_eight_models_with_skewed_popularity_on_eight_places(replicated: Replicated, say: Say) -> None:
    url, log, count = replicated

    async def main() -> None:
        names = random.Random(3).choices([f"m{i}" for i in range(8)], [1 / (i + 1) for i in range(8)], k=200)
        before = sum(loads(log, f"m{i}") for i in range(8))
        replies = await asyncio.gather(*(ask(url, name, name, max_tokens=2) for name in names))
        assert all(reply.text.startswith(name) for reply, name in zip(replies, names, strict=True))
        loaded = sum(loads(log, f"m{i}") for i in range(8)) - before
        say(f"200 requests over 8 models, {count} replicas of {8 // count} places: {loaded} loads")
        assert loaded <= 12

    asyncio.run(main())


def least_recently_used_misses(names: list[str], places: int) -> int:
    """How often a least-recently-used cache of `places` places would have to load."""
    held: list[str] = []
    misses = 0
    for name in names:
        misses += name not in held
        held = [name, *(other for other in held if other != name)][:places]
    return misses


@pytest.mark.long
def test_a_hundred_mixed_requests_over_three_models_in_two_places(cluster: str, tmp_path: Path, say: Say) -> None:
    models = [model(name, tmp_path, seconds=0.2) for name in "abc"]
    args = {"models": models, "max_models_per_replica": 2, "swap_patience_s": 0.3, "api": API}
    with serving(cluster, args) as url:

        async def main() -> None:
            rng = random.Random(1)
            begins = sorted(rng.random() * 2 for _ in range(100))
            names = [rng.choice("abc") for _ in begins]

            async def later(name: str, begin: float) -> Any:
                await asyncio.sleep(begin)
                return await ask(url, name, name, max_tokens=5, stream=rng.random() < 0.5)

            replies = await asyncio.gather(*map(later, names, begins))
            assert [reply.text for reply in replies] == ["".join(f"{name} {i} " for i in range(5)) for name in names]
            assert {reply.status for reply in replies} == {200}
            loaded = sum(loads(tmp_path, name) for name in "abc")
            evicted = await asyncio.to_thread(total, url, "evictions")
            busy = sum(cut_off(tmp_path, name) for name in "abc")
            switches = least_recently_used_misses(names, 2)
            say(
                f"100 of 100 right; {evicted} evictions, {busy} of a model in use; {loaded} loads, where one after the "
                f"other would have taken {switches}"
            )
            assert loaded == evicted + 2
            assert busy == 0
            assert loaded <= switches

        asyncio.run(main())


def test_an_unknown_model_is_refused_at_once_and_drives_nothing_out(replicated: Replicated, say: Say) -> None:
    url, _, _ = replicated

    async def main() -> None:
        before = await asyncio.to_thread(total, url, "evictions")
        replies = [await ask(url, "nobody") for _ in range(10)]
        assert {(reply.status, (reply.error or {})["code"]) for reply in replies} == {(404, "model_not_found")}
        fastest = min(reply.seconds for reply in replies)
        say(f"404 after {1e3 * fastest:.0f} ms")
        assert fastest < 0.05
        assert await asyncio.to_thread(total, url, "evictions") == before

    asyncio.run(main())
