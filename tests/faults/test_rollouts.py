"""A running application is deployed again, with other arguments for its loader: no request is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.faults.clients import Reply, ask
from tests.faults.conftest import Say
from tests.faults.paced import model
from tests.serving import deploy, serving

OPTIONS: dict[str, Any] = {"num_replicas": 2, "ray_actor_options": {"num_gpus": 0, "num_cpus": 0.5}}


def args(tag: str) -> dict[str, Any]:
    return {"models": [model("a", pace=0.02, tag=tag, preload=True)]}


@pytest.fixture(scope="module")
def url(cluster: str) -> Any:
    with serving(cluster, args("one-"), **OPTIONS) as address:
        yield address


def test_requests_and_streams_outlive_a_rolling_update_of_a_loaders_kwargs(url: str, say: Say) -> None:
    async def main() -> None:
        streams = [asyncio.create_task(ask(url, "a", "s", stream=True, max_tokens=300)) for _ in range(6)]
        await asyncio.sleep(1)
        update = asyncio.create_task(asyncio.to_thread(deploy, url, args("two-"), **OPTIONS))
        replies: list[Reply] = []

        async def client() -> None:
            while not update.done():
                replies.append(await ask(url, "a", "q", max_tokens=5))
            replies.append(await ask(url, "a", "q", max_tokens=5))

        await asyncio.gather(*(client() for _ in range(4)))
        await update
        whole = [await stream for stream in streams]
        assert {reply.text for reply in whole} == {"".join(f"one-s {i} " for i in range(300))}
        failed = [(reply.status, reply.error) for reply in replies if reply.status != 200]
        assert failed == []
        assert {reply.text.split("-")[0] for reply in replies} == {"one", "two"}
        assert all(reply.text.startswith("two-") for reply in replies[-4:])
        say(
            f"6 of 6 streams whole, {len(replies)} of {len(replies)} requests answered during the update, "
            f"the slowest after {max(reply.seconds for reply in replies):.1f} s"
        )

    asyncio.run(main())
