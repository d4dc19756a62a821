"""The files of captures: what writes them, how large they are together, and whom that holds up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from deployments.config.api import CaptureOptions
from deployments.engine.inside.recording import Recording
from deployments.host.inside.captures import CaptureStore
from deployments.inside_client import load_capture
from tests.openai.conftest import Serve, Server

LARGE = "a few words and " * 55
TINY = {"id": "tiny", "loader": "tests.openai.tiny_models:load_model"}


def complete(server: Server, prompt: str, modules: str, **more: Any) -> dict[str, Any]:
    """The choice of a completion that captures the states of all tokens."""
    capture = {"modules": [modules], "positions": "all", **more}
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    extra = {"capture": capture, "return_token_ids": True}
    answer = requests.post(f"{server.url}/v1/completions", json={**body, **extra}, timeout=120)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return dict(choice)


def test_a_large_file_is_made_read_and_removed_off_the_loop(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds up no other request, however large it is."""
    loops, threads = set[str](), dict[str, set[str]]()

    def noted(owner: Any, name: str, *, of: Any = None, loop: bool = False) -> None:
        plain = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            here = threading.current_thread().name
            if loop:
                loops.add(here)
            elif owner is Recording or str(tmp_path) in str(args[0]):
                threads.setdefault(name, set()).add(here)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    noted(CaptureStore, "write", loop=True)
    noted(Recording, "tensors")
    for owner, name in ((os, "open"), (Path, "open"), (Path, "unlink")):
        noted(owner, name)
    server = serve([TINY], captures={"dir": str(tmp_path)})
    handle = complete(server, LARGE, "**.self_attn:attention")["capture"]
    assert handle["bytes"] > 20 << 20
    assert len(requests.get(server.url + handle["url"], timeout=60).content) == handle["bytes"]
    assert requests.delete(server.url + handle["url"], timeout=60).status_code == 204
    assert requests.get(server.url + handle["url"], timeout=60).status_code == 404
    wait_until(lambda: not list(tmp_path.glob("*/cap-*")))
    assert len(loops) == 1
    assert set(threads) == {"tensors", "open", "unlink"}
    assert not loops & set.union(*threads.values())


def wait_until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


def test_a_file_is_written_without_a_copy_of_its_numbers(tmp_path: Path) -> None:
    """A copy holds Python's lock, and the event loop waits for it, whatever thread makes it."""
    states = torch.arange(16 << 20, dtype=torch.float32).view(-1, 1024)

    async def write() -> dict[str, Any] | None:
        store = CaptureStore(CaptureOptions(dir=str(tmp_path)))
        shapes = {"states": ("float32", list(states.shape))}
        tracemalloc.start()
        handle = store.write(store.new_id(), "", shapes, "{}", lambda: {"states": states})
        found = await store.info(handle["id"], "")
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert largest < 4 << 20
        return found

    handle = asyncio.run(write())
    (path,) = tmp_path.glob("*/cap-*")
    assert handle is not None
    assert path.stat().st_size == handle["bytes"]
    assert torch.equal(load_capture(path)["states"], states)


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.long)])
def test_requests_wait_for_room_and_all_end(serve: Serve, tmp_path: Path, count: int) -> None:
    """Room for a tenth of the files of requests that come at once, until those before expire."""
    prompt, fits = "abcdefgh" * 8, max(2, count // 10)
    nbytes = complete(serve([TINY]), prompt, "hidden_states")["capture"]["bytes"]
    captures = {"dir": str(tmp_path), "ttl_s": 0.3, "gib": (fits + 0.5) * nbytes / 2**30}
    server = serve([TINY], captures=captures)
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, len(list(tmp_path.glob("*/cap-*"))))

    def one(number: int) -> tuple[str, list[int]]:
        choice = complete(server, f"{number:08d}" * 8, "hidden_states")
        # It may expire at any time.
        with contextlib.suppress(requests.exceptions.ChunkedEncodingError):
            file = requests.get(server.url + choice["capture"]["url"], timeout=60)
            assert file.status_code in (200, 404)
            if file.status_code == 200:
                ids = [*choice["prompt_token_ids"], *choice["token_ids"]][:-1]
                assert load_capture(file.content).token_ids.tolist() == ids
        return choice["capture"]["id"], choice["token_ids"]

    with ThreadPoolExecutor(count + 1) as pool:
        pool.submit(watch)
        try:
            found = list(pool.map(one, range(count)))
        finally:
            done.set()
    assert len({capture for capture, _ in found}) == count
    assert 0 < most <= fits
    wait_until(lambda: not list(tmp_path.glob("*/cap-*")))
