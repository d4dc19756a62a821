"""The ingress, the proxy or the controller is killed: what its clients see, and how soon all is well again."""

from __future__ import annotations

import asyncio
import time

import pytest
import ray

from tests.faults.clients import Reply, ask, replicas, until
from tests.faults.conftest import Say
from tests.faults.processes import CONTROLLER, INGRESS, PROXY, kill, pids

TOKENS = 200
WHOLE = "".join(f"s {i} " for i in range(TOKENS))


@pytest.fixture
def url(two_replicas: str) -> str:
    return two_replicas


async def streaming(url: str, count: int) -> list[asyncio.Task[Reply]]:
    """`count` streams of four seconds, each past its first token."""
    started = [asyncio.Event() for _ in range(count)]
    streams = [
        asyncio.create_task(ask(url, "a", "s", stream=True, max_tokens=TOKENS, on_first=event)) for event in started
    ]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in started)), 60)
    return streams


async def served_again(url: str) -> float:
    """Seconds until a request is answered in full."""
    began = time.monotonic()
    while time.monotonic() - began < 60:
        try:
            if (await asyncio.wait_for(ask(url, "a", "new", max_tokens=2), 30)).text == "new 0 new 1 ":
                break
        except (OSError, ValueError, LookupError, TimeoutError):
            await asyncio.sleep(0.05)
    return time.monotonic() - began


def controller() -> int | None:
    """Its process; None while there is none."""
    try:
        return pids(CONTROLLER)[0]
    except (LookupError, ray.exceptions.RayError, ValueError):
        return None


def idle(url: str) -> bool:
    try:
        return all(m["in_use"] == 0 for replica in replicas(url) for m in replica["models"])
    except (OSError, ValueError, LookupError):
        return False


@pytest.mark.parametrize("kind", [INGRESS, PROXY])
def test_a_killed_process_before_the_replicas_ends_its_streams_and_is_replaced(url: str, kind: str, say: Say) -> None:
    # Other applications have an ingress, too; the proxy is everybody's.
    victim = f"::{url.rpartition('/')[2]}{kind}" if kind == INGRESS else kind

    async def main() -> None:
        streams = await streaming(url, 4)
        await asyncio.to_thread(kill, victim)
        killed = time.monotonic()
        replies = await asyncio.wait_for(asyncio.gather(*streams), 30)
        if kind == INGRESS:  # The proxy says what has happened.
            assert all(reply.complete and reply.chunks[-1] == "[DONE]" for reply in replies)
            assert {(reply.error or {})["code"] for reply in replies} == {"unavailable"}
        else:
            assert not any(reply.complete for reply in replies)
        again = await served_again(url)
        free = await until(lambda: idle(url), 30)
        say(
            f"4 streams ended after {max(r.ended for r in replies) - killed:.2f} s at most, 0 hung; "
            f"a new request served after {again:.2f} s; no row left {free:.2f} s later"
        )
        assert again < 60
        assert free < 30

    asyncio.run(main())


@pytest.mark.long
def test_no_request_hangs_that_is_sent_while_the_ingress_is_killed(url: str, say: Say) -> None:
    """The one that is on its way to the process is sent to the next, which must not wait for a body that is lost."""
    victim = f"::{url.rpartition('/')[2]}{INGRESS}"

    async def main() -> None:
        replies: list[Reply] = []

        async def client(stop: asyncio.Event) -> None:
            while not stop.is_set():
                replies.append(await asyncio.wait_for(ask(url, "a", "x" * 20_000, max_tokens=1), 30))

        for _ in range(4):
            stop = asyncio.Event()
            clients = [asyncio.create_task(client(stop)) for _ in range(40)]
            await until(lambda: len(replies) >= 40, 30)
            await asyncio.to_thread(kill, victim)
            await served_again(url)
            stop.set()
            await asyncio.gather(*clients)
        lost = [reply for reply in replies if reply.status != 200]
        assert all(not reply.status or (reply.error or {})["code"] == "unavailable" for reply in lost)
        slowest = max(reply.seconds for reply in replies)
        say(f"{len(replies)} requests, {len(lost)} of them lost; the slowest took {slowest:.1f} s")

    asyncio.run(main())


def test_nobody_notices_that_the_controller_was_killed(url: str, say: Say) -> None:
    async def main() -> None:
        streams = await streaming(url, 4)
        before = await asyncio.to_thread(kill, CONTROLLER)
        began = time.monotonic()
        waits = []
        while not all(stream.done() for stream in streams):
            reply = await ask(url, "a", "new", max_tokens=2)
            assert reply.text == "new 0 new 1 "
            waits.append(reply.seconds)
        assert {stream.result().text for stream in streams} == {WHOLE}
        back = await until(lambda: controller() not in (None, before), 60)
        say(
            f"4 of 4 streams whole, {len(waits)} new requests in {time.monotonic() - began:.1f} s, the slowest "
            f"{max(waits):.2f} s; the controller is back after {back:.2f} s"
        )

    asyncio.run(main())
