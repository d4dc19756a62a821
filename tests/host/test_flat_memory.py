"""Memory does not grow with what was loaded: adapters come and go, and models take turns.

Counted is what is allocated, to the byte, and not the size of the process: that moves by 2 % as the allocator splits
and joins what was freed, which hides a leak of a tokenizer a load.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from deployments.engine.base.failures import free_memory
from deployments.host.host import ModelHost
from tests.adapters.lora import write_adapter
from tests.host.test_host import entry, host_of
from tests.tiny import byte_tokenizer, llama

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL = 26_000_000
"""Bytes of a model."""
BLOCK = 100
"""Bytes of an object that Python's own allocator has, about."""
KEPT: list[Any] = []


class _Allocated(ctypes.Structure):
    """What glibc's mallinfo2 gives."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "used", "free", "keepcost")
    ]


_mallinfo = ctypes.CDLL(None).mallinfo2
_mallinfo.restype = _Allocated


class Memory(NamedTuple):
    """Bytes at one moment.

    Attributes:
        visits: before it.
        held: allocated, by any part of the process.
        process: its size in memory.
    """

    visits: int
    held: int
    process: int


def memory(visits: int) -> Memory:
    free_memory()
    allocated = _mallinfo()
    held = allocated.used + allocated.mapped + BLOCK * sys.getallocatedblocks()
    return Memory(visits, held, psutil.Process().memory_info().rss)


def large(seed: int = 0) -> dict[str, Any]:
    """A model, so large that one that stays is seen in the size of the process too."""
    return {"model": llama(seed=seed, hidden_size=512, intermediate_size=2048), "tokenizer": byte_tokenizer()}


def leaks_a_tokenizer(seed: int = 0) -> dict[str, Any]:
    KEPT.append(byte_tokenizer())
    return large(seed)


def leaks_a_hundredth(seed: int = 0) -> dict[str, Any]:
    KEPT.append(torch.zeros(MODEL // 100 // 4))
    return large(seed)


async def visits(host: ModelHost, names: list[str], rounds: int, *, unload: bool) -> list[Memory]:
    """Memory after every round, or after thirty of many; the first tenth left out."""
    taken = []
    for count in range(rounds):
        for name in names:
            async with host.lease(name):
                pass
            if unload:
                await host.unload(name)
        if count >= rounds // 10 and count % max(1, rounds // 30) == 0:
            taken.append(memory((count + 1) * len(names)))
    return taken


def growth(taken: list[Memory]) -> float:
    """Bytes that a visit leaves behind: the least of the last third of the figures against that of the first.

    At times a thread has not ended yet, which holds 2 MB.
    """
    third = len(taken) // 3
    first, last = (min(part, key=lambda each: each.held) for part in (taken[:third], taken[-third:]))
    before, after = (median(each.process for each in part) for part in (taken[:third], taken[-third:]))
    assert after < before + 2 * MODEL, "the allocator keeps what one or two models had, no more"
    found = (last.held - first.held) / (last.visits - first.visits)
    print(
        f"{found:.0f} bytes a visit; {[(round(each.held / 1e6, 3), round(each.process / 1e6, 1)) for each in taken]} MB"
    )
    return found


@pytest.mark.parametrize("rounds", [25, pytest.param(250, marks=pytest.mark.long)], ids=["hundred", "thousand"])
def test_adapters_that_come_and_go(rounds: int, tmp_path: Path) -> None:
    """What a visit leaves behind is less than a hundredth of an adapter."""
    folders = [write_adapter(llama(), tmp_path / f"a{i}", LINEARS, seed=i, rank=64) for i in range(4)]
    adapters = [{"id": folder.name, "base": "base", "adapter": str(folder)} for folder in folders]
    base = {**entry("base"), "engine": {"kind": "auto"}}

    async def main() -> list[Memory]:
        async with host_of(base, *adapters) as host:
            return await visits(host, [folder.name for folder in folders], rounds, unload=True)

    torch.set_num_threads(1)
    assert growth(asyncio.run(main())) < (folders[0] / "adapter_model.safetensors").stat().st_size / 100


def of_two_models(load: Any, gib: int, rounds: int) -> float:
    models = [entry(name, load, kwargs={"seed": i}, engine={"kind": "auto"}) for i, name in enumerate("ab")]

    async def main() -> list[Memory]:
        async with host_of(*models, host_memory_gib=gib) as host:
            taken = await visits(host, ["a", "b"], rounds, unload=False)
            assert len(host.snapshot()["host_copies"]) == gib
            return taken

    torch.set_num_threads(1)
    return growth(asyncio.run(main()))


@pytest.mark.long
@pytest.mark.parametrize("gib", [0, 1])
def test_fifty_loads_of_two_models(gib: int) -> None:
    """What a load leaves behind is less than a thousandth of a model, and less than half of a tokenizer."""
    assert of_two_models(large, gib, 25) < MODEL / 1000


@pytest.mark.long
@pytest.mark.parametrize(("load", "size"), [(leaks_a_tokenizer, 50_000), (leaks_a_hundredth, MODEL // 100)])
def test_a_leak_is_found(load: Any, size: int) -> None:
    KEPT.clear()
    assert of_two_models(load, 0, 25) > 0.9 * size > MODEL / 1000
    KEPT.clear()
