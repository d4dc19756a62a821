#!/usr/bin/env python3
"""How long live requests wait for their first token beside a batch, against the same without one.

    python scripts/bench_beside_batch.py

Starts a server of the demo model in one process without Ray, and needs no network. Rounds without a batch and beside
one take turns; figures are medians over the rounds, and so is the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from statistics import median, quantiles
from typing import Any

from openai import OpenAI

from deployments.cli.bench.client import Job, run

MODEL = {
    "id": "demo",
    "loader": "model_loaders.demo:load_model",
    "engine": {"kind": "auto", "max_batch_size": 16, "threads": 1},
}
SERVE = """
import json, sys, uvicorn
from deployments.local import make_app
uvicorn.run(make_app(json.loads(sys.argv[1])), port=int(sys.argv[2]), log_level="warning")
"""
LINES = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40, help="of a round")
    parser.add_argument("--concurrency", type=int, default=2, help="live requests at a time")
    arguments = parser.parse_args()
    found: dict[str, list[list[float]]] = {"alone": [], "beside a batch": []}
    with server() as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        for number in range(arguments.rounds + 1):
            for name, rounds in found.items():
                with beside(client) if name != "alone" else contextlib.nullcontext():
                    firsts = live(url, number, arguments)
                if number:  # The first round warms up.
                    rounds.append(firsts)
    show(found)


def live(url: str, number: int, arguments: argparse.Namespace) -> list[float]:
    """Seconds until each first token of a round."""
    job = Job(
        url=f"{url}/v1",
        models=("demo",),
        workload="short",
        concurrency=arguments.concurrency,
        conversations=arguments.requests,
        seed=1000 * number,
    )
    return [each["first"] for each in run(job)["requests"] if not each["error"]]


def show(found: dict[str, list[list[float]]]) -> None:
    for name, rounds in found.items():
        middle, late = median(map(median, rounds)), median(map(p95, rounds))
        print(f"{name:16} first token, median {1e3 * middle:.1f} ms, p95 {1e3 * late:.1f} ms")
    alone, beside_it = found.values()
    ratios = [p95(own) / p95(other) for other, own in zip(alone, beside_it, strict=True)]
    print(f"p95 beside a batch / alone: {median(ratios):.2f} (rounds: {', '.join(f'{r:.2f}' for r in ratios)})")


def p95(seconds: list[float]) -> float:
    return quantiles(seconds, n=20)[-1]


@contextlib.contextmanager
def beside(client: OpenAI) -> Iterator[None]:
    """A batch that runs during the block."""
    lines = []
    for i in range(LINES):
        message = {"role": "user", "content": f"Say {i}. " * 30}
        body = {"model": "demo", "messages": [message], "max_tokens": 64, "ignore_eos": True}
        line = {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line))
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while not counts(client, batch.id):
        time.sleep(0.1)
    before = counts(client, batch.id)
    yield
    print(f"{counts(client, batch.id) - before} lines were computed meanwhile", file=sys.stderr, flush=True)
    client.batches.cancel(batch.id)
    while client.batches.retrieve(batch.id).status != "cancelled":
        time.sleep(0.1)


def counts(client: OpenAI, batch_id: str) -> int:
    found: Any = client.batches.retrieve(batch_id).request_counts
    return int(found.completed)


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of a server of the demo model, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        args = json.dumps({"models": [MODEL], "state_dir": folder})
        process = subprocess.Popen([sys.executable, "-c", SERVE, args, str(port)])
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process)
            yield url
        finally:
            process.terminate()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
            return
        time.sleep(0.2)
    raise SystemExit("The server has ended; its errors are above.")


if __name__ == "__main__":
    main()
