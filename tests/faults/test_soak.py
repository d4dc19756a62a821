"""Two minutes of everything at once: nothing fails that was not meant to, and memory stays."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from tests.faults.clients import API, ask
from tests.faults.conftest import Say
from tests.faults.paced import model
from tests.faults.processes import INGRESS, PROXY, REPLICA, memory
from tests.serving import serving

SECONDS = 120.0
WARM_UP = 30.0


@pytest.fixture
def url(cluster: str) -> Any:
    models = [model(name, pace=0.01, engine={"max_batch_size": 64}) for name in "abc"]
    args = {
        "models": models,
        "max_models_per_replica": 2,
        "swap_patience_s": 0.5,
        "api": API,
    }
    with serving(cluster, args) as address:
        yield address


async def operation(url: str, rng: random.Random) -> int:
    """One request of some kind; its status."""
    name = rng.choice("aab")
    match rng.randrange(6):
        case 0:
            return (await ask(url, name, stream=True, max_tokens=rng.randrange(1, 100))).status
        case 1:
            return (await ask(url, name, stream=True, max_tokens=2000, leave_after=rng.randrange(1, 5))).status
        case 2:
            return (await ask(url, "nobody")).status
        case 3:
            return (await ask(url, name, temperature=-1)).status
        case 4:
            return (
                await ask(url, "c" if rng.random() < 0.05 else name, "x" * rng.randrange(10_000), max_tokens=5)
            ).status
        case _:
            return (await ask(url, name, max_tokens=rng.randrange(1, 50), n=rng.randrange(1, 4))).status


@pytest.mark.long
def test_two_minutes_of_everything(url: str, say: Say) -> None:
    async def main() -> None:
        end = time.monotonic() + SECONDS
        statuses: list[int] = []

        async def client(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                statuses.append(await operation(url, rng))

        clients = [asyncio.create_task(client(seed)) for seed in range(16)]
        await asyncio.sleep(WARM_UP)
        before = await asyncio.to_thread(memory, INGRESS, REPLICA, PROXY)
        await asyncio.gather(*clients)
        after = await asyncio.to_thread(memory, INGRESS, REPLICA, PROXY)
        growth = [after[pid] / size - 1 for pid, size in before.items()]
        say(
            f"{len(statuses)} requests in {SECONDS:.0f} s, statuses {sorted(set(statuses))}; memory of ingress, "
            f"replica and proxy after {WARM_UP:.0f} s to the end {', '.join(f'{g:+.1%}' for g in growth)}"
        )
        assert set(statuses) <= {200, 400, 404}
        assert max(growth) < 0.05

    asyncio.run(main())
