"""Clients that leave, clients that dawdle, and more clients than there is room for."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import requests

from tests.faults.clients import API, KEY, Reply, ask, p, read_stream, replicas, until
from tests.faults.conftest import BATCH, Say
from tests.faults.paced import model
from tests.faults.processes import INGRESS, PROXY, REPLICA, memory
from tests.forms import forms
from tests.serving import serving

ROOT = Path(__file__).parent.parent.parent
PACE = 0.01


@pytest.fixture(scope="module")
def url(cluster: str) -> Any:
    many = {"max_batch_size": 256}
    models = [
        model("a", pace=PACE, engine=many, preload=True),
        model("calm", pace=0.05, engine=many, preload=True),
        model("few", pace=PACE),
    ]
    with serving(cluster, {"models": models, "max_models_per_replica": 3, "api": API}) as address:
        yield address


def in_flight(url: str) -> int:
    """Rows and requests that any replica still works on."""
    return sum(m["sequences"] + m["waiting"] + m["in_use"] for r in replicas(url) for m in r["models"])


async def storm(url: str, streams: int) -> float:
    """Streams of 50 seconds whose clients leave after one token; seconds until nothing of them is left."""
    leaving = (ask(url, "a", f"{i}", leave_after=2, stream=True, max_tokens=5000) for i in range(streams))
    assert {reply.status for reply in await asyncio.gather(*leaving)} == {200}
    return await until(lambda: in_flight(url) == 0, 30)


def test_streams_dropped_after_one_token_leave_nothing_behind(url: str, say: Say) -> None:
    async def main() -> None:
        ends = [await storm(url, 100) for _ in range(3)]
        assert (await ask(url, "a", "after", max_tokens=2)).text == "after 0 after 1 "
        say(f"3 x 100 streams dropped: no row left {max(ends):.2f} s later at most")
        assert max(ends) < 30

    asyncio.run(main())


@pytest.mark.long
def test_two_hundred_streams_dropped_ten_times(url: str, say: Say) -> None:
    async def main() -> None:
        for _ in range(2):  # until the allocators have what two hundred streams need
            await storm(url, 200)
        ends, sizes = [], [await asyncio.to_thread(memory, INGRESS, REPLICA, PROXY)]
        for _ in range(10):
            ends.append(await storm(url, 200))
            sizes.append(await asyncio.to_thread(memory, INGRESS, REPLICA, PROXY))
        began = time.monotonic()
        assert (await ask(url, "a", "after", max_tokens=2)).text == "after 0 after 1 "
        growth = [sizes[-1][pid] / size - 1 for pid, size in sizes[0].items()]
        say(
            f"10 x 200 streams dropped: no row left {max(ends):.2f} s later at most (median {p(0.5, ends):.2f} s); "
            f"memory of ingress, replica and proxy {', '.join(f'{g:+.1%}' for g in growth)}; "
            f"the next request {1e3 * (time.monotonic() - began):.0f} ms"
        )
        assert max(growth) < 0.05
        assert max(ends) < 1

    asyncio.run(main())


def unsent(url: str) -> list[int]:
    """The bytes that every connection of a server keeps because nobody takes them."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = int(url.split(":")[2].partition("/")[0])
    return [int(f[4].partition(":")[0], 16) for f in lines if int(f[1].partition(":")[2], 16) == port and f[3] == "01"]


@pytest.mark.long
def test_slow_readers_slow_nobody_else(url: str, say: Say) -> None:
    """In turns of 30 requests, so that what else the machine does meets both."""
    firsts: dict[float, list[float]] = {0.0: [], 1.0: []}
    stuck, gone = [], []

    async def turn(pause: float) -> None:
        readers = [asyncio.create_task(read_stream(url, "calm", "x" * 2000, pause)) for _ in range(20)]
        await until(lambda: in_flight(url) >= 20, 20)
        await asyncio.sleep(3)
        if pause:
            stuck.append(sum(size > 50_000 for size in unsent(url)))
        for i in range(30):
            reply = await ask(url, "calm", f"{i}", stream=True, max_tokens=1)
            firsts[pause].append(reply.first or 99.0)
        for reader in readers:
            reader.cancel()
        waited = await until(lambda: in_flight(url) == 0, 30)
        if pause:
            gone.append(waited)

    async def main() -> None:
        for _ in range(10):
            await turn(0.0)
            await turn(1.0)
        quick, slow = firsts.values()
        median, tail = (p(share, slow) / p(share, quick) for share in (0.5, 0.99))
        say(
            f"{len(slow)} first tokens beside 20 readers of a byte a second and as many beside 20 quick ones, in "
            f"turns: p99 {1e3 * p(0.99, slow):.0f} and {1e3 * p(0.99, quick):.0f} ms, x{tail:.2f}; "
            f"median {1e3 * p(0.5, slow):.0f} and {1e3 * p(0.5, quick):.0f} ms, x{median:.2f}; "
            f"{min(stuck)} connections full; their rows are free {max(gone):.2f} s after they leave"
        )
        assert min(stuck) == 20
        assert median < 1.2
        assert tail < 1.2

    asyncio.run(main())


def test_the_first_token_of_a_stream_is_not_held_back(url: str, say: Say) -> None:
    async def main() -> None:
        replies = [await ask(url, "a", stream=True, max_tokens=200) for _ in range(5)]
        first, whole = p(0.5, [r.first or 99.0 for r in replies]), p(0.5, [r.seconds for r in replies])
        events = len(replies[0].chunks)
        say(f"first token after {1e3 * first:.0f} ms of {1e3 * whole:.0f} ms; {events} events for 200 tokens")
        assert first < whole / 4
        assert events < 200

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_six_megabytes_cross_to_the_replica_and_back(url: str, say: Say, stream: bool) -> None:
    async def main() -> None:
        text = "x" * 6_000_000
        reply = await ask(url, "a", text, max_tokens=1, stream=stream)
        say(f"6 MB in and out, {'streamed' if stream else 'whole'}: {reply.seconds:.2f} s")
        assert reply.text == f"{text} 0 "

    asyncio.run(main())


async def flood(url: str, seconds: float, clients: int) -> list[Reply]:
    """`clients` that ask again as soon as they are answered, or as long as they are told to wait."""
    replies: list[Reply] = []
    end = time.monotonic() + seconds

    async def one(i: int) -> None:
        while time.monotonic() < end:
            reply = await ask(url, "few", f"{i}", max_tokens=20)
            replies.append(reply)
            if reply.status == 429:
                await asyncio.sleep(min(float(reply.headers["retry-after"]), end - time.monotonic()) if end else 0)

    await asyncio.gather(*(one(i) for i in range(clients)))
    return replies


def goodput(replies: list[Reply], seconds: float) -> float:
    return sum(reply.status == 200 for reply in replies) / seconds


def test_prometheus_sees_it(url: str, say: Say) -> None:
    async def main() -> None:
        for stream in (True, False):
            assert (await ask(url, "a", max_tokens=5, stream=stream)).status == 200
        port = next(node["MetricsExportPort"] for node in ray.nodes() if node["Alive"])
        wanted = set(re.findall(r"ray_troupe_[a-z_]+", (ROOT / "docs" / "grafana.json").read_text()))
        wanted -= {"ray_troupe_model_load_failures_total", "ray_troupe_model_evictions_total"}  # nothing failed yet
        wanted -= {"ray_troupe_cached_tokens_total"}

        def missing() -> set[str]:
            places = (f"http://127.0.0.1:{port}", url)
            key = {"Authorization": f"Bearer {KEY}"}
            texts = [requests.get(f"{place}/metrics", headers=key, timeout=5).text for place in places]
            return {name for name in wanted if any(name not in text for text in texts)}

        await until(lambda: not missing(), 40)
        assert missing() == set()
        say(f"{len(wanted)} metrics of docs/grafana.json exported")

    asyncio.run(main())


@pytest.mark.long
@pytest.mark.parametrize("seconds", [5, 60])
def test_overload_queues_without_a_cap(url: str, say: Say, seconds: int) -> None:
    async def main() -> None:
        await ask(url, "few", max_tokens=1)
        capacity = goodput(await flood(url, 3, BATCH), 3)
        replies = await flood(url, seconds, 10 * BATCH)
        statuses = {reply.status for reply in replies}
        began = time.monotonic()
        await ask(url, "few", max_tokens=2)
        recovery = time.monotonic() - began
        share = goodput(replies, max(seconds, 1)) / capacity
        say(
            f"10 x capacity for {seconds} s: {len(replies)} requests, all 200; {share:.0%} of {capacity:.0f}/s; "
            f"the next alone {1e3 * recovery:.0f} ms"
        )
        assert statuses == {200}
        assert recovery < 5

    asyncio.run(main())


@forms("seconds", 3, 60)
def test_overload_with_a_cap_is_refused_in_time(capped: str, say: Say, seconds: int) -> None:
    async def main() -> None:
        await ask(capped, "few", max_tokens=1)
        began = time.monotonic()
        replies = await flood(capped, min(seconds, 10), BATCH)
        capacity = goodput(replies, max(reply.ended for reply in replies) - began)
        began = time.monotonic()
        replies = await flood(capped, seconds, 10 * BATCH)
        share = goodput(replies, max(reply.ended for reply in replies) - began) / capacity
        refused = [reply for reply in replies if reply.status == 429]
        began = time.monotonic()
        assert (await ask(capped, "few", max_tokens=2)).status == 200
        recovery = time.monotonic() - began
        say(
            f"{seconds} s, cap {2 * BATCH}: {len(refused)} of {len(replies)} refused with Retry-After, goodput "
            f"{share:.0%} of {capacity:.0f}/s, the next alone {1e3 * recovery:.0f} ms"
        )
        assert {reply.status for reply in replies} == {200, 429}
        assert all((reply.error or {})["code"] == "overloaded" and reply.headers["retry-after"] for reply in refused)
        assert share > (0.9 if seconds == 60 else 0.5)
        assert recovery < 5

    asyncio.run(main())
