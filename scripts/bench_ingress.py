#!/usr/bin/env python
"""What serving adds to a request, one at a time: the same simulated model with more and more of the layers before it.

    scripts/bench_ingress.py [--rounds 20] [--each 10] [--targets engine host local serve fast]

    engine   the engine alone: submit, wait for the last event
    host     with leases, chat template, encoding and merging of events, in one process
    local    with the API over HTTP, still one process
    serve    Ray Serve: proxy, ingress, router, replica
    fast     Ray Serve in the fast mode: HAProxy, one loop per process

    and, when asked for, Ray Serve's own share, an ingress and a replica that do nothing but pass the request on:
    bare, bare-fast

All servers run at once and take turns of a few requests, so that a busy machine is equally busy for each. A request is
a chat of 1,000 words and an answer of one token (5 ms of a simulated decode step, 40 of prefill the first time), whole
and streamed; times are medians in milliseconds, and what they are above the engine's; `cpu` is the processor time of a
request in all processes of the server, which a busy machine changes least.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from deployments.cli.endpoint.processes import free_port  # noqa: E402
from deployments.cli.fast_mode import fast_environment  # noqa: E402
from deployments.cli.own_ray import use_own_ray  # noqa: E402
from deployments.config.app import parse_args  # noqa: E402
from deployments.config.engine import EngineOptions  # noqa: E402
from deployments.core.calls import ChatPrompt, GenerateCall, SamplingParams  # noqa: E402
from deployments.engine.base.protocol import EngineRequest  # noqa: E402
from deployments.host.host import ModelHost  # noqa: E402
from model_loaders.contract import as_model_info  # noqa: E402
from model_loaders.examples.simulated import load_model  # noqa: E402


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked, streamed or not, and the process it runs in, with all that this has started."""

    ask: Callable[[bool], None]
    process: int

    def cpu_seconds(self) -> float:
        """Processor time that the target has taken so far."""
        parents: dict[int, tuple[int, int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                parents[int(stat.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
        tree = {self.process}
        while more := {pid for pid, (parent, _) in parents.items() if parent in tree} - tree:
            tree |= more
        return sum(parents[pid][1] for pid in tree if pid in parents) / os.sysconf("SC_CLK_TCK")


LOADER = {"loader": "model_loaders.examples.simulated:load_model", "kwargs": {"load_seconds": 0.0}}
MESSAGES = [
    {"role": role, "content": " ".join(f"word{i * 100 + j}" for j in range(100))}
    for i, role in enumerate(["system", *["user", "assistant"] * 4, "user"])
]
ARGS: dict[str, Any] = {"models": [{"id": "m", "preload": True, **LOADER}]}


@contextlib.contextmanager
def engine() -> Iterator[Target]:
    info = as_model_info(load_model("cpu", load_seconds=0.0), "here")
    assert info.engine is not None
    running = info.engine(info, EngineOptions())
    ids = list(range(1000))
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask(stream: bool) -> None:
        running.submit(EngineRequest(request_id="r", input_ids=ids, sampling=SamplingParams(max_tokens=1)), events.put)
        assert events.get().finish_reason

    yield Target(ask, 0)
    running.close()


@contextlib.contextmanager
def host() -> Iterator[Target]:
    models = ModelHost(parse_args(ARGS), "cpu")
    loop = asyncio.new_event_loop()
    loop.run_until_complete(models.preload())

    async def all_events(stream: bool) -> None:
        prompt = ChatPrompt(messages=MESSAGES)
        sampling = SamplingParams(max_tokens=1)
        call = GenerateCall(request_id="r", model="m", prompts=(prompt,), sampling=sampling, stream=stream)
        assert [event async for event in models.generate(call)]

    yield Target(lambda stream: loop.run_until_complete(all_events(stream)), 0)
    loop.run_until_complete(models.close())
    loop.close()


@contextlib.contextmanager
def local() -> Iterator[Target]:
    port = free_port()
    command = [sys.executable, "-m", "deployments.local", "--port", str(port), "--id", "m"]
    with server([*command, "--loader", str(LOADER["loader"]), "--kwargs", json.dumps(LOADER["kwargs"])], port) as asked:
        yield asked


@contextlib.contextmanager
def serve(app: str = "troupe", fast: bool = False) -> Iterator[Target]:
    """Ray Serve without its dashboard, with one ingress and one replica."""
    port = free_port()
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts.bench_ingress import stay; stay({port}, {app!r})"
    )
    settings = fast_environment(os.environ) if fast else {}
    with server([sys.executable, "-c", code], port, settings) as asked:
        yield asked
    if fast:
        shutil.rmtree(Path(settings["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent)


def stay(port: int, app: str) -> None:
    """Serve on a port until a signal to end."""
    use_own_ray()
    from ray import serve

    from tests.serving import cluster

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with cluster(cpus=4, gpus=0, port=port):
        serve.run(bare() if app == "bare" else troupe())
        signal.pause()


def troupe() -> Any:
    from deployments.app import application

    return application(parse_args(ARGS), num_replicas=1, ray_actor_options={"num_gpus": 0})


def bare() -> Any:
    """Two deployments as close to nothing as Ray Serve lets them be."""
    from ray import serve

    class Replica:
        async def answer(self, body: bytes) -> bytes:
            return body[:300]

    class Ingress:
        def __init__(self, replica: Any) -> None:
            self._replica = replica.options(method_name="answer", _by_reference=False)

        async def __call__(self, request: Any) -> str:
            answer: bytes = await self._replica.remote(await request.body())
            return answer.decode()

    deploy: Any = serve.deployment(max_ongoing_requests=1000)
    return deploy(Ingress).bind(deploy(Replica).bind())


@contextlib.contextmanager
def server(command: list[str], port: int, settings: Mapping[str, str] | None = None) -> Iterator[Target]:
    """A server in a process of its own, asked over one connection."""
    environment = {**os.environ, **(settings or {}), "LOGLEVEL": "WARNING"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            connection = wait_for(process, port)
            if connection is None:
                log.seek(0)
                raise SystemExit(f"{' '.join(command)} does not answer:\n{log.read()[-3000:]}")
            yield Target(asker(connection), process.pid)
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


def asker(connection: http.client.HTTPConnection) -> Callable[[bool], None]:
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


TARGETS: dict[str, Callable[[], contextlib.AbstractContextManager[Target]]] = {
    "engine": engine,
    "host": host,
    "local": local,
    "serve": serve,
    "fast": lambda: serve(fast=True),
    "bare": lambda: serve("bare"),
    "bare-fast": lambda: serve("bare", fast=True),
}


@dataclass(slots=True)
class Measured:
    """Seconds of every request, and processor seconds of all, the target's own housekeeping taken off."""

    whole: list[float] = field(default_factory=list)
    streamed: list[float] = field(default_factory=list)
    cpu: float = 0.0


def measure(targets: dict[str, Target], rounds: int, each: int) -> dict[str, Measured]:
    """What requests take, in turns of `each` requests."""
    for target in targets.values():
        for _ in range(20):
            target.ask(False)
    idle = {name: -target.cpu_seconds() for name, target in targets.items()}
    time.sleep(5)
    idle = {name: (idle[name] + target.cpu_seconds()) / 5 for name, target in targets.items()}
    found = {name: Measured() for name in targets}
    for _ in range(rounds):
        for name, target in targets.items():
            started, cpu = time.perf_counter(), target.cpu_seconds()
            for stream, times in ((False, found[name].whole), (True, found[name].streamed)):
                for _ in range(each):
                    began = time.perf_counter()
                    target.ask(stream)
                    times.append(time.perf_counter() - began)
            found[name].cpu += target.cpu_seconds() - cpu - idle[name] * (time.perf_counter() - started)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=[name for name in TARGETS if "bare" not in name]
    )
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        targets = {name: stack.enter_context(TARGETS[name]()) for name in given.targets}
        measured = measure(targets, given.rounds, given.each)
    base = statistics.median(measured[given.targets[0]].whole)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {given.rounds * given.each} requests each")
    print("target     whole  p50   +p50    p95   stream  p50   +p50    p95   cpu")
    for name, found in measured.items():
        row = f"{name:9}"
        for times in (found.whole, found.streamed):
            middle = statistics.median(times)
            row += (
                f"{1e3 * middle:12.2f} {1e3 * (middle - base):6.2f} {1e3 * sorted(times)[int(0.95 * len(times))]:6.2f} "
            )
        cpu = 1e3 * found.cpu / len(found.whole + found.streamed)
        print(row + (f"{cpu:7.2f}" if targets[name].process else ""))


if __name__ == "__main__":
    main()
