"""SIGTERM: a server on its way out ends what it has begun."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml

from deployments.cli.endpoint.processes import free_port
from tests.faults.clients import ask, until
from tests.faults.conftest import Say
from tests.faults.paced import model

ROOT = Path(__file__).parent.parent.parent
TOKENS = 250


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`scripts/serve` with a model that takes 20 ms a token."""
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "app",
                "route_prefix": "/",
                "import_path": "deployments.app:build_app",
                "args": {"models": [model("a", pace=0.02, preload=True)]},
                "deployments": [{"name": "ModelReplica", "num_replicas": 1, "ray_actor_options": {"num_gpus": 0}}],
            }
        ],
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["scripts/serve", str(file)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield f"http://127.0.0.1:{port}", process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def check_end(url: str, process: subprocess.Popen[bytes], ended_by: signal.Signals, say: Say) -> None:
    """A signal lets the requests end that run on a model `a`, and takes no new ones."""

    async def main() -> None:
        started = [asyncio.Event() for _ in range(4)]
        running = [
            asyncio.create_task(ask(url, "a", "s", stream=True, max_tokens=TOKENS, on_first=event)) for event in started
        ]
        running += [asyncio.create_task(ask(url, "a", "s", max_tokens=TOKENS)) for _ in range(4)]
        await asyncio.gather(*(event.wait() for event in started))
        process.send_signal(ended_by)
        sent = time.monotonic()
        refused = None
        while not all(task.done() for task in running):
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reply = await ask(url, "a", "late", max_tokens=1)
                if refused is None and reply.status == 503:
                    refused = reply
            await asyncio.sleep(0.05)
        replies = [task.result() for task in running]
        assert [reply.text for reply in replies] == ["".join(f"s {i} " for i in range(TOKENS))] * 8
        assert refused is not None
        assert (refused.error or {})["code"] == "unavailable"
        assert refused.headers["retry-after"]
        last = max(reply.ended for reply in replies)
        await asyncio.to_thread(process.wait, 60)
        say(
            f"8 of 8 requests in full, a new one refused with 503 and Retry-After; the last ended {last - sent:.1f} s "
            f"after the signal, the server {time.monotonic() - last:.1f} s later"
        )

    asyncio.run(main())


@pytest.mark.long
def test_sigterm_lets_running_requests_end_and_takes_no_new_ones(tmp_path: Path, say: Say) -> None:
    """The suite's form is in tests/e2e/test_serve_run.py."""
    with server(tmp_path) as (url, process):
        asyncio.run(until(lambda: answers(url), 180))
        assert process.poll() is None, (tmp_path / "log").read_text()
        check_end(url, process, signal.SIGTERM, say)


@pytest.mark.long
def test_a_second_sigterm_ends_at_once(tmp_path: Path, say: Say) -> None:
    async def main(url: str, process: subprocess.Popen[bytes]) -> None:
        await until(lambda: answers(url), 180)
        running = asyncio.create_task(ask(url, "a", "s", stream=True, max_tokens=10_000))
        await asyncio.sleep(2)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        await asyncio.to_thread(process.wait, 60)
        assert not (await running).complete
        say(f"the server ended {time.monotonic() - began:.1f} s after the second signal")

    with server(tmp_path) as (url, process):
        asyncio.run(main(url, process))
