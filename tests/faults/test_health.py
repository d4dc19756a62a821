"""An engine whose thread has ended: its requests fail at once, and Ray Serve replaces its replica."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from tests.faults.clients import ask, replicas, until
from tests.faults.conftest import Say


def test_a_dead_engine_fails_its_requests_and_its_health_check(fragile: tuple[str, Path], say: Say) -> None:
    url, folder = fragile

    async def main() -> None:
        assert (await ask(url, "mortal", "What is 27 + 45?")).text.strip() == "72"
        ((before, _),) = await asyncio.to_thread(healthy, url)
        (folder / "end").touch()
        began = time.monotonic()
        stream, whole = await asyncio.gather(
            ask(url, "mortal", "What is 27 + 45?", stream=True), ask(url, "mortal", "What is 31 + 11?")
        )
        codes = {(reply.error or {}).get("code") for reply in (stream, whole)}
        assert codes <= {"unavailable", None}
        assert "unavailable" in codes
        failed = max(stream.seconds, whole.seconds)
        await until(lambda: any(pid != before and ok for pid, ok in healthy(url)), 120)
        replaced = time.monotonic() - began
        assert (await ask(url, "mortal", "What is 27 + 45?")).text.strip() == "72"
        ((after, _),) = await asyncio.to_thread(healthy, url)
        assert after != before
        say(f"its requests failed after {failed:.2f} s; a new replica served after {replaced:.1f} s")

    asyncio.run(main())


def healthy(url: str) -> list[tuple[int, bool]]:
    """The process of every replica, and whether it has its model; nothing while they cannot be asked."""
    with contextlib.suppress(OSError, LookupError):
        return [(replica["pid"], bool(replica["models"])) for replica in replicas(url)]
    return []
