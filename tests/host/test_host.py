"""The models of one process, with real tiny models and real engines."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

import pytest
import torch

from deployments.config.app import parse_args
from deployments.core.calls import ChatPrompt, GenerateCall, SamplingParams, TextPrompt
from deployments.core.client import EmbedOptions
from deployments.core.errors import LoadTimeout, ModelError, ModelLoadFailed, OutOfMemory, Unavailable
from deployments.core.events import Delta, Event, Failed, Finished
from deployments.engine.base.stream_pace import StreamPace
from deployments.host.host import ModelHost
from tests.tiny import byte_tokenizer, llama

pytestmark = pytest.mark.usefixtures("all_is_walked")

LOADED: list[weakref.ref[Any]] = []
RELEASE = threading.Event()
ROOM = {"models": 99}


def load_model(seed: int = 0) -> dict[str, Any]:
    """A tiny Llama, remembered without being kept alive."""
    model = llama(seed=seed)
    LOADED.append(weakref.ref(model))
    return {"model": model, "tokenizer": byte_tokenizer()}


def fails(seed: int = 0) -> dict[str, Any]:
    half_loaded = load_model(seed)
    raise RuntimeError(f"{type(half_loaded['model']).__name__} has torn weights")


def is_late() -> dict[str, Any]:
    RELEASE.wait(20)
    return load_model()


def too_large_for_two(seed: int = 0) -> dict[str, Any]:
    """Runs out of memory while more than ROOM other models live."""
    gc.collect()
    alive = sum(reference() is not None for reference in LOADED)
    if alive > ROOM["models"]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    return load_model(seed)


def hanging_hook() -> dict[str, Any]:
    def encode(text: str, **_: Any) -> Any:
        if "hang" in text:
            RELEASE.wait(20)
        return byte_tokenizer()(text, return_tensors="pt")

    return {**load_model(), "encode": encode}


def embedding_on_a_lost_gpu() -> dict[str, Any]:
    def embed(texts: list[str]) -> torch.Tensor:
        if "poison" in texts:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        return torch.eye(4)[: len(texts)]

    return {"model": torch.nn.Linear(4, 4), "tokenizer": byte_tokenizer(), "embed": embed}


def entry(name: str, loader: Callable[..., Any] = load_model, **fields: Any) -> dict[str, Any]:
    return {"id": name, "loader": f"{loader.__module__}:{loader.__name__}", "engine": {"kind": "generate"}, **fields}


@contextlib.asynccontextmanager
async def host_of(
    *models: dict[str, Any],
    gone: list[str] | None = None,
    pace: Callable[[float], StreamPace] = StreamPace,
    **args: Any,
) -> AsyncIterator[ModelHost]:
    settings = {"models": list(models), "swap_patience_s": 0.05, **args}
    on_gone = (gone if gone is not None else []).append
    host = ModelHost(parse_args(settings), "cpu", on_gone=on_gone, pace=pace)
    try:
        yield host
    finally:
        await host.close()


async def freed(model: weakref.ref[Any]) -> None:
    """Wait until nothing holds a model any more: the thread of its load ends in its own time."""
    deadline = time.monotonic() + 40
    while model() is not None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
        gc.collect()


def call(model: str = "a", text: str = "hi", **fields: Any) -> GenerateCall:
    sampling = SamplingParams(temperature=0, max_tokens=fields.pop("max_tokens", 8), ignore_eos=True)
    messages = [{"role": "user", "content": text}]
    return GenerateCall(
        request_id=f"r{time.monotonic_ns()}",
        model=model,
        prompts=(ChatPrompt(messages=messages),),
        sampling=sampling,
        **fields,
    )


async def events_of(host: ModelHost, asked: GenerateCall) -> list[Event]:
    async with contextlib.aclosing(host.generate(asked)) as events:
        return [event async for event in events]


def error_of(events: list[Event]) -> Exception:
    assert isinstance(events[-1], Failed)
    return events[-1].error


def run(main: Coroutine[Any, Any, None]) -> None:
    torch.set_num_threads(1)
    LOADED.clear()
    RELEASE.clear()
    ROOM["models"] = 99
    try:
        asyncio.run(asyncio.wait_for(main, 60))
    finally:
        RELEASE.set()


def test_an_unloaded_model_leaves_memory() -> None:
    async def main() -> None:
        async with host_of(
            entry("a", engine={"kind": "continuous_batching"}),
            entry("b", kwargs={"seed": 1}, engine={"kind": "continuous_batching"}),
        ) as host:
            assert isinstance((await events_of(host, call("a")))[-1], Finished)
            assert isinstance((await events_of(host, call("b")))[-1], Finished)
            await freed(LOADED[0])
            assert LOADED[1]() is not None

    run(main())


def test_a_failed_load_keeps_nothing_alive_and_its_error_does_not_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # pytest keeps what is logged, and the traceback in it the model.
    monkeypatch.setattr(logging.getLogger("troupe.loader"), "disabled", True)

    async def main() -> None:
        gone: list[str] = []
        async with host_of(entry("a", fails), gone=gone) as host:
            errors = [error_of(await events_of(host, call("a"))) for _ in range(5)]
            assert all(isinstance(error, ModelLoadFailed) for error in errors)
            assert "torn weights" in str(errors[0])
            assert len(LOADED) == 1, "not loaded again for every request"
            del errors
            await freed(LOADED[0])
            assert "a" in gone

    run(main())


def test_a_loader_that_hangs_is_not_called_again_while_it_hangs_and_its_late_model_is_closed() -> None:
    async def main() -> None:
        async with host_of(entry("a", is_late, load_timeout_s=0.2, load_retry_s=0)) as host:
            for _ in range(2):
                error = error_of(await events_of(host, call("a")))
                assert isinstance(error, LoadTimeout)
                assert "in wait" in str(error)
            assert LOADED == []
            RELEASE.set()
            deadline = time.monotonic() + 40
            while not (LOADED and LOADED[0]() is None) and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
                gc.collect()
            assert [reference() for reference in LOADED] == [None]
            await asyncio.sleep(0.1)
            host.args.models[0].load_timeout_s = 60
            assert isinstance((await events_of(host, call("a")))[-1], Finished)

    run(main())


def test_a_model_that_does_not_fit_beside_another_takes_its_place() -> None:
    async def main() -> None:
        ROOM["models"] = 0
        models = entry("a", too_large_for_two), entry("b", too_large_for_two, kwargs={"seed": 1})
        async with host_of(*models, max_models_per_replica=2) as host:
            for name in ("a", "b", "a"):
                assert isinstance((await events_of(host, call(name)))[-1], Finished)
                assert set(host.leases.values()) == {name}

    run(main())


def test_a_model_that_does_not_fit_at_all_is_out_of_memory() -> None:
    async def main() -> None:
        ROOM["models"] = -1
        async with host_of(entry("a", too_large_for_two)) as host:
            assert isinstance(error_of(await events_of(host, call("a"))), OutOfMemory)

    run(main())


def test_a_hanging_hook_is_named_and_the_others_are_served() -> None:
    async def main() -> None:
        async with host_of(entry("a", hanging_hook, hook_timeout_s=0.3)) as host:
            await host.load("a")
            hanging = asyncio.create_task(events_of(host, call(text="hang")))
            await asyncio.sleep(0.05)
            began = time.monotonic()
            assert isinstance((await events_of(host, call()))[-1], Finished)
            assert time.monotonic() - began < 5
            error = error_of(await hanging)
            assert isinstance(error, ModelError)
            assert "test_host.py" in str(error) or "in wait" in str(error)

    run(main())


def test_closing_a_stream_frees_its_row() -> None:
    async def main() -> None:
        async with host_of(entry("a", engine={"kind": "continuous_batching", "max_batch_size": 4})) as host:
            await host.load("a")
            for _ in range(8):
                async with contextlib.aclosing(host.generate(call(max_tokens=400, stream=True))) as events:
                    async for event in events:
                        if isinstance(event, Delta):
                            break
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                (model,) = host.snapshot()["models"]
                if (left := (model["sequences"], model["waiting"], model["in_use"])) == (0, 0, 0):
                    break
                await asyncio.sleep(0.01)
            assert left == (0, 0, 0)

    run(main())


def test_a_requester_that_leaves_does_not_stop_the_load() -> None:
    async def main() -> None:
        async with host_of(entry("a", is_late)) as host:
            first = asyncio.create_task(events_of(host, call()))
            second = asyncio.create_task(events_of(host, call()))
            await asyncio.sleep(0.1)
            first.cancel()
            await asyncio.sleep(0.1)
            RELEASE.set()
            assert isinstance((await second)[-1], Finished)
            assert len(LOADED) == 1

    run(main())


def test_idle_models_leave_and_preloaded_ones_are_there() -> None:
    async def main() -> None:
        async with host_of(entry("a", preload=True), entry("b", idle_unload_s=0.2), max_models_per_replica=2) as host:
            await host.preload()
            assert set(host.leases.values()) == {"a"}
            await events_of(host, call("b"))
            assert set(host.leases.values()) == {"a", "b"}
            await asyncio.sleep(0.6)
            assert set(host.leases.values()) == {"a"}

    run(main())


def test_draining_refuses_new_calls_and_ends_those_that_run() -> None:
    async def main() -> None:
        async with host_of(entry("a")) as host:
            await host.load("a")
            running = asyncio.create_task(events_of(host, call(max_tokens=100)))
            await asyncio.sleep(0.01)
            await host.drain()
            error = error_of(await events_of(host, call()))
            assert isinstance(error, Unavailable)
            assert error.retry_after
            assert isinstance((await running)[-1], Finished)
            await host.drain(False)
            assert isinstance((await events_of(host, call()))[-1], Finished)

    run(main())


def test_embeddings_on_a_gpu_that_computes_nothing_more_fail_the_health_check() -> None:
    async def main() -> None:
        async with host_of(entry("a", embedding_on_a_lost_gpu, engine={"kind": "auto"})) as host:
            await host.embed("a", [TextPrompt(text="hi")], EmbedOptions())
            host.check()
            with pytest.raises(ModelError, match="Hook embed failed"):
                await host.embed("a", [TextPrompt(text="poison")], EmbedOptions())
            with pytest.raises(ModelError, match="GPU computes nothing more in this process"):
                host.check()

    run(main())


@pytest.mark.parametrize(("least_ms", "merged"), [(20, True), (0, False)], ids=["by default", "every token at once"])
def test_streams_that_would_have_too_many_chunks_together_have_fewer(least_ms: float, merged: bool) -> None:
    async def main() -> None:
        async with host_of(
            entry("a"), pace=partial(StreamPace, chunks_per_s=0.01), stream_interval_ms=least_ms
        ) as host:
            asked = [call(text=text, max_tokens=100, stream=True) for text in ("a", "b", "c", "d")]
            for events in await asyncio.gather(*(events_of(host, each) for each in asked)):
                deltas = [event for event in events if isinstance(event, Delta)]
                assert sum(len(delta.token_ids) for delta in deltas) == 100
                assert (len(deltas) == 2) == merged, "what was there at once, and the rest"

    run(main())
