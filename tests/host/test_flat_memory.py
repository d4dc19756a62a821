"""Memory does not grow with what was loaded: adapters come and go, and models take turns."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import torch

from deployments.host.host import ModelHost
from tests.adapters.lora import write_adapter
from tests.host.test_host import entry, host_of
from tests.tiny import byte_tokenizer, llama

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def large(seed: int = 0) -> dict[str, Any]:
    """A model of 26 MB, so that one that stays is seen."""
    return {"model": llama(seed=seed, hidden_size=512, intermediate_size=2048), "tokenizer": byte_tokenizer()}


async def visits(host: ModelHost, names: list[str], rounds: int, *, unload: bool) -> list[int]:
    """Bytes of the process after each tenth of the rounds, the first tenth left out."""
    taken = []
    for count in range(rounds):
        for name in names:
            async with host.lease(name):
                pass
            if unload:
                await host.unload(name)
        if count >= rounds // 10 and count % max(1, rounds // 10) == 0:
            gc.collect()
            taken.append(psutil.Process().memory_info().rss)
    return taken


def flat(taken: list[int]) -> bool:
    """Whether the figures stay: the last third of them against the first, with 2 % for what the allocator keeps."""
    third = max(1, len(taken) // 3)
    return median(taken[-third:]) <= 1.02 * median(taken[:third])


@pytest.mark.parametrize("rounds", [25, pytest.param(250, marks=pytest.mark.long)], ids=["hundred", "thousand"])
def test_adapters_that_come_and_go(rounds: int, tmp_path: Path) -> None:
    folders = [write_adapter(llama(), tmp_path / f"a{i}", LINEARS, seed=i, rank=64) for i in range(4)]
    adapters = [{"id": folder.name, "base": "base", "adapter": str(folder)} for folder in folders]
    base = {**entry("base"), "engine": {"kind": "auto"}}

    async def main() -> list[int]:
        async with host_of(base, *adapters) as host:
            return await visits(host, [folder.name for folder in folders], rounds, unload=True)

    torch.set_num_threads(1)
    assert flat(asyncio.run(main()))


@pytest.mark.long
@pytest.mark.parametrize("gib", [0, 1])
def test_fifty_loads_of_two_models(gib: int) -> None:
    models = [entry(name, large, kwargs={"seed": i}, engine={"kind": "auto"}) for i, name in enumerate("ab")]

    async def main() -> list[int]:
        async with host_of(*models, host_memory_gib=gib) as host:
            taken = await visits(host, ["a", "b"], 25, unload=False)
            assert len(host.snapshot()["host_copies"]) == gib
            return taken

    torch.set_num_threads(1)
    assert flat(asyncio.run(main()))
