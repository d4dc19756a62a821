#!/usr/bin/env python
"""What serving adds to a request, one at a time: the same simulated model behind more and more of the way to a client.

    scripts/bench_ingress.py [--rounds 20] [--each 10] [--targets engine host local serve fast]

    engine   the engine alone: submit, wait for the last event
    host     with leases, chat template, encoding and merging of events, in one process
    local    with the API over HTTP, still one process
    serve    Ray Serve: proxy, ingress, router, replica
    fast     Ray Serve in the fast mode: HAProxy, one loop per process

All servers run at once and take turns of a few requests, so that a busy machine is equally busy for each. A request is
a chat of 1,000 words and an answer of one token (5 ms of a simulated decode step, 40 of prefill the first time), whole
and streamed; times are medians in milliseconds, and what they are above the engine's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from deployments.config import parse_args  # noqa: E402
from deployments.engine.options import EngineOptions  # noqa: E402
from deployments.engine.protocol import EngineRequest  # noqa: E402
from deployments.fast_mode import fast_environment  # noqa: E402
from deployments.host import ModelHost  # noqa: E402
from deployments.messages import ChatPrompt, GenerateCall, SamplingParams  # noqa: E402
from model_loaders.contract import as_model_info  # noqa: E402
from model_loaders.simulated import load_model  # noqa: E402
from tests.serving import free_port  # noqa: E402

Ask = Callable[[bool], None]

LOADER = {"loader": "model_loaders.simulated:load_model", "kwargs": {"load_seconds": 0.0}}
MESSAGES = [
    {"role": role, "content": " ".join(f"word{i * 100 + j}" for j in range(100))}
    for i, role in enumerate(["system", *["user", "assistant"] * 4, "user"])
]
ARGS: dict[str, Any] = {"models": [{"id": "m", "preload": True, **LOADER}]}


@contextlib.contextmanager
def engine() -> Iterator[Ask]:
    info = as_model_info(load_model("cpu", load_seconds=0.0), "here")
    assert info.engine is not None
    running = info.engine(info, EngineOptions())
    ids = list(range(1000))
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask(stream: bool) -> None:
        running.submit(EngineRequest(request_id="r", input_ids=ids, sampling=SamplingParams(max_tokens=1)), events.put)
        assert events.get().finish_reason

    yield ask
    running.close()


@contextlib.contextmanager
def host() -> Iterator[Ask]:
    models = ModelHost(parse_args(ARGS), "cpu")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(models.preload())

    async def all_events(stream: bool) -> None:
        prompt = ChatPrompt(messages=MESSAGES)
        sampling = SamplingParams(max_tokens=1)
        call = GenerateCall(request_id="r", model="m", prompts=(prompt,), sampling=sampling, stream=stream)
        assert [event async for event in models.generate(call)]

    yield lambda stream: loop.run_until_complete(all_events(stream))
    loop.run_until_complete(models.close())
    loop.close()


@contextlib.contextmanager
def local() -> Iterator[Ask]:
    port = free_port()
    command = [sys.executable, "-m", "deployments.local", "--port", str(port), "--id", "m"]
    with server([*command, "--loader", str(LOADER["loader"]), "--kwargs", json.dumps(LOADER["kwargs"])], port) as ask:
        yield ask


@contextlib.contextmanager
def serve(fast: bool = False) -> Iterator[Ask]:
    """Ray Serve without its dashboard, with one ingress and one replica."""
    port = free_port()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts.bench_ingress import stay; stay({port})"
    settings = fast_environment(os.environ) if fast else {}
    with server([sys.executable, "-c", code], port, settings) as ask:
        yield ask
    if fast:
        shutil.rmtree(Path(settings["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent)


def stay(port: int) -> None:
    """Serve on a port until a signal to end."""
    from ray import serve

    from deployments.app import application
    from tests.serving import cluster

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with cluster(cpus=4, gpus=0, port=port):
        serve.run(application(parse_args(ARGS), num_replicas=1, ray_actor_options={"num_gpus": 0}))
        signal.pause()


@contextlib.contextmanager
def server(command: list[str], port: int, settings: Mapping[str, str] | None = None) -> Iterator[Ask]:
    """A server in a process of its own, asked over one connection."""
    environment = {**os.environ, **(settings or {}), "LOGLEVEL": "WARNING"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            connection = wait_for(process, port)
            if connection is None:
                log.seek(0)
                raise SystemExit(f"{' '.join(command)} does not answer:\n{log.read()[-3000:]}")
            yield asker(connection)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for(process: subprocess.Popen[bytes], port: int) -> http.client.HTTPConnection | None:
    """A connection to a server that answers; None if it never does."""
    for _ in range(600):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                return connection
        if process.poll() is not None:
            break
        time.sleep(0.3)
    return None


def asker(connection: http.client.HTTPConnection) -> Ask:
    def ask(stream: bool) -> None:
        body = json.dumps({"model": "m", "messages": MESSAGES, "max_tokens": 1, "stream": stream})
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
        except ConnectionError:  # the server has closed it while the others had their turns
            connection.close()
            return ask(stream)
        text = answer.read()
        assert answer.status == 200, text
        return None

    return ask


TARGETS: dict[str, Callable[[], contextlib.AbstractContextManager[Ask]]] = {
    "engine": engine,
    "host": host,
    "local": local,
    "serve": serve,
    "fast": lambda: serve(fast=True),
}


def measure(asks: dict[str, Ask], rounds: int, each: int) -> dict[tuple[str, bool], list[float]]:
    """Seconds of every request, by target and whether it was streamed."""
    times: dict[tuple[str, bool], list[float]] = {(name, stream): [] for name in asks for stream in (False, True)}
    for ask in asks.values():
        for _ in range(20):
            ask(False)
    for _ in range(rounds):
        for (name, stream), seconds in times.items():
            for _ in range(each):
                began = time.perf_counter()
                asks[name](stream)
                seconds.append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        asks = {name: stack.enter_context(TARGETS[name]()) for name in given.targets}
        times = measure(asks, given.rounds, given.each)
    base = statistics.median(times[given.targets[0], False])
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {given.rounds * given.each} requests each")
    print("target    whole  p50   +p50   p95    stream  p50   +p50   p95")
    for name in given.targets:
        row = f"{name:8}"
        for stream in (False, True):
            taken = sorted(times[name, stream])
            middle = statistics.median(taken)
            row += f"{1e3 * middle:12.2f} {1e3 * (middle - base):6.2f} {1e3 * taken[int(0.95 * len(taken))]:6.2f}   "
        print(row)


if __name__ == "__main__":
    main()
