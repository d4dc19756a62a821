"""More than one node, and more than one number of replicas: docs/scaling.md as a user would follow it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cli.endpoint.processes import free_port
from tests.e2e.test_serve_run import running
from tests.faults.clients import KEY, ask, replicas
from tests.faults.conftest import Say, say  # noqa: F401
from tests.faults.paced import model

pytestmark = pytest.mark.long


def environment() -> dict[str, str]:
    """That of a user, with this environment's commands."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t" * 32,
    }


def write_config(file: Path, **deployments: dict[str, Any]) -> int:
    """A configuration with a paced model on a free port, which is returned; options of deployments by their name."""
    port = free_port()
    app = {
        "name": "troupe",
        "route_prefix": "/",
        "import_path": "deployments.app:build_app",
        "args": {"models": [model("a", pace=0.05, preload=True)], "api": {"api_keys": [KEY], "admin_keys": [KEY]}},
        "deployments": [{"name": name, **options} for name, options in deployments.items()],
    }
    http = {"host": "127.0.0.1", "port": port}
    config = {"proxy_location": "HeadOnly", "http_options": http, "applications": [app]}
    file.write_text(yaml.safe_dump(config))
    return port


@contextlib.contextmanager
def served(file: Path, port: int, log: Path, **variables: str) -> Iterator[str]:
    """`scripts/serve` on a configuration, once it answers."""
    with running(["scripts/serve", str(file)], {**environment(), **variables}, log) as process:
        wait_for(log, "Troupe answers", process)
        yield f"http://127.0.0.1:{port}"


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()[-3000:]
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)


def reach(count: int, url: str, seconds: float = 120.0) -> float:
    """Seconds until there are `count` replicas, all of which answer."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(KeyError):  # an error: one that has been announced does not answer yet
            if len(replicas(url)) == count:
                return time.monotonic() - began
        assert time.monotonic() - began < seconds, f"never {count} replicas"
        time.sleep(0.2)


def test_replicas_come_with_the_load_and_go_with_it(tmp_path: Path, say: Say) -> None:  # noqa: F811
    from tests.test_scale import documented

    (example,) = [d for block in documented() for d in block.get("deployments", []) if "autoscaling_config" in d]
    quick = {
        **example["autoscaling_config"],
        "max_replicas": 2,
        "target_ongoing_requests": 4,
        "upscale_delay_s": 1,
        "downscale_delay_s": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
    }
    options = {**example, "autoscaling_config": quick, "ray_actor_options": {"num_gpus": 0, "num_cpus": 0.1}}
    file = tmp_path / "config.yaml"
    port = write_config(file, **{options.pop("name"): options})

    async def main(url: str) -> None:
        await asyncio.to_thread(reach, 1, url)
        asking = [asyncio.create_task(ask(url, "a", f"{i}", max_tokens=800, stream=True)) for i in range(16)]
        up = await asyncio.to_thread(reach, 2, url)
        more = await asyncio.gather(*(ask(url, "a", f"{i}", max_tokens=2) for i in range(16)))
        replies = [*await asyncio.gather(*asking), *more]
        assert {(reply.status, reply.complete) for reply in replies} == {(200, True)}
        down = await asyncio.to_thread(reach, 1, url)
        assert (await ask(url, "a", "after", max_tokens=1)).text == "after 0 "
        say(f"1 -> 2 replicas {up:.0f} s after the load came, 1 again {down:.0f} s after it went; all answered")

    with served(file, port, tmp_path / "log") as url:
        asyncio.run(main(url))


@contextlib.contextmanager
def node(log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray node in a process group of its own."""
    ports = {
        name: free_port()
        for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    }
    command = ["ray", "start", "--block", *options, *(f"--{name}={port}" for name, port in ports.items())]
    with (
        contextlib.suppress(ProcessLookupError),  # the test has ended it
        running([*command, "--disable-usage-stats"], environment(), log) as process,
    ):
        wait_for(log, "Ray runtime started", process)
        yield process


def test_two_nodes_and_the_loss_of_one(tmp_path: Path, say: Say) -> None:  # noqa: F811
    address = f"127.0.0.1:{free_port()}"
    # The ingress needs what the first node alone has: the test is about replicas.
    first = {"num_cpus": 0, "resources": {"first": 1}}
    second = {"num_replicas": 2, "max_replicas_per_node": 1, "ray_actor_options": {"num_gpus": 0, "num_cpus": 1}}
    file = tmp_path / "config.yaml"
    port = write_config(file, OpenAIIngress={"ray_actor_options": first}, ModelReplica=second)
    head = ["--head", f"--port={address.partition(':')[2]}", f"--ray-client-server-port={free_port()}", "--num-cpus=2"]
    # Not in Ray's own folder, where it would be the cluster that every later Ray of this machine joins.
    home = tempfile.mkdtemp(prefix="tr", dir="/tmp")
    head += [f"--temp-dir={home}"]
    head += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", '--resources={"first": 4}', "--num-gpus=0"]

    async def main(url: str, other: subprocess.Popen[bytes]) -> None:
        await asyncio.to_thread(reach, 2, url)
        assert len({replica["node"] for replica in replicas(url)}) == 2
        before = {r["pid"] for r in replicas(url)}
        replies = await asyncio.gather(*(ask(url, "a", f"{i}", max_tokens=2) for i in range(40)))
        assert {reply.status for reply in replies} == {200}
        assert {r["pid"] for r in replicas(url) if sum(m["generated_tokens"] for m in r["models"])} == before
        asking = [asyncio.create_task(ask(url, "a", f"{i}", max_tokens=40)) for i in range(20)]
        await asyncio.sleep(1)
        victims = [pid for pid in before if descends(pid, other.pid)]
        assert len(victims) == 1
        os.killpg(other.pid, signal.SIGKILL)
        os.kill(victims[0], signal.SIGKILL)
        lost = await asyncio.gather(*asking)
        after = await asyncio.gather(*(ask(url, "a", f"{i}", max_tokens=2) for i in range(20)))
        good, later = (sum(reply.status == 200 for reply in some) for some in (lost, after))
        say(f"2 nodes, a replica each, both served; one killed under 20 requests: {good} answered, {later} of 20 after")
        assert good == 20
        assert later == 20

    with (
        node(tmp_path / "first", *head),
        node(tmp_path / "second", f"--address={address}", "--num-cpus=2", "--num-gpus=0") as other,
        served(file, port, tmp_path / "log", RAY_ADDRESS=address) as url,
    ):
        asyncio.run(main(url, other))
    shutil.rmtree(home, ignore_errors=True)


def descends(pid: int, ancestor: int) -> bool:
    """Whether a process was started by another, or by one that it had started."""
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False
