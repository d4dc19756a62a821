"""Processes that die: what their clients see, and how soon all is well again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.clients import ask, replicas, until
from tests.faults.conftest import Say

TOKENS = 150


@pytest.fixture
def url(two_replicas: str) -> str:
    return two_replicas


def healthy(url: str) -> bool:
    found = replicas(url)
    return len(found) == 2 and all(replica["models"] for replica in found)


async def busiest(url: str) -> dict[str, Any]:
    found = await asyncio.to_thread(replicas, url)
    return max(found, key=lambda replica: sum(m["sequences"] for m in replica["models"]))


@pytest.mark.parametrize("in_time", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_killed_replica_ends_its_streams_with_an_error_and_no_others(url: str, in_time: bool, say: Say) -> None:
    async def main() -> None:
        await until(lambda: healthy(url), 120)
        started = [asyncio.Event() for _ in range(8)]
        streams = [
            asyncio.create_task(ask(url, "a", f"{i}", stream=True, max_tokens=TOKENS, on_first=started[i]))
            for i in range(8)
        ]
        await asyncio.gather(*(event.wait() for event in started))
        os.kill((await busiest(url))["pid"], signal.SIGKILL)
        killed = time.monotonic()
        first_new = asyncio.create_task(ask(url, "a", "new", max_tokens=2))
        done, _ = await asyncio.wait(streams, timeout=30)
        replies = [stream.result() for stream in done]
        broken = [reply for reply in replies if reply.error]
        whole = [reply for reply in replies if not reply.error]
        assert len(replies) == 8
        assert broken
        assert all(reply.complete and reply.chunks[-1] == "[DONE]" for reply in replies)
        assert {(reply.error or {})["code"] for reply in broken} == {"unavailable"}
        for reply in whole:
            name = reply.text.split()[0]
            assert reply.text == "".join(f"{name} {i} " for i in range(TOKENS))
        reply = await first_new
        assert reply.text == "new 0 new 1 "
        ended = max(reply.ended for reply in broken) - killed
        say(
            f"{len(broken)} streams ended with an SSE error and [DONE] after {ended:.2f} s at most, {len(whole)} in "
            f"full, 0 hung; a new request was served after {reply.seconds:.2f} s"
        )
        assert ended < (2 if in_time else 20)
        assert reply.seconds < (5 if in_time else 60)

    asyncio.run(main())


def test_requests_without_a_stream_survive_their_replica(url: str, say: Say) -> None:
    async def main() -> None:
        await until(lambda: healthy(url), 120)
        asked = [asyncio.create_task(ask(url, "a", f"{i}", max_tokens=TOKENS)) for i in range(8)]
        await asyncio.sleep(1)
        os.kill((await busiest(url))["pid"], signal.SIGKILL)
        replies = await asyncio.gather(*asked)
        right = sum(
            reply.status == 200 and reply.text == "".join(f"{i} {j} " for j in range(TOKENS))
            for i, reply in enumerate(replies)
        )
        say(f"{right} of 8 requests answered in full, the slowest after {max(r.seconds for r in replies):.1f} s")
        assert right == 8

    asyncio.run(main())


def test_a_loader_that_kills_its_process_does_not_take_the_others_along(fragile: tuple[str, Path], say: Say) -> None:
    url, _ = fragile

    async def main() -> None:
        assert (await ask(url, "a", max_tokens=1)).status == 200
        reply = await ask(url, "crashing", max_tokens=1)
        assert (reply.status, (reply.error or {})["code"]) == (503, "unavailable")
        again = await ask(url, "a", max_tokens=1)
        assert again.status == 200
        say(f"503 after {reply.seconds:.1f} s; another model served {again.seconds:.1f} s later")

    asyncio.run(main())
