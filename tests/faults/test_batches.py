"""A batch whose processes are killed: no accepted line is lost, and no finished one is computed again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import yaml
from openai import OpenAI

from deployments.cli.endpoint.processes import free_port
from tests.faults.clients import KEY
from tests.faults.conftest import Say
from tests.faults.paced import model
from tests.faults.processes import kill
from tests.openai.batches.batching import create, ended, request, results
from tests.serving import serving

ROOT = Path(__file__).parent.parent.parent
OWNER = "#BatchOwner#"


def lines(count: int) -> list[dict[str, Any]]:
    return [request(f"r{i}", f"{i}", model="a", max_tokens=2) for i in range(count)]


def check_all(client: OpenAI, batch_id: str, count: int) -> None:
    """Each line has its answer once."""
    batch = ended(client, batch_id, 300)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": count, "completed": count, "failed": 0}
    found = results(client, batch.output_file_id)
    answers = {name: line["response"]["body"]["choices"][0]["message"]["content"] for name, line in found.items()}
    assert answers == {f"r{i}": f"{i} 0 {i} 1 " for i in range(count)}


def completed(client: OpenAI, batch_id: str) -> int:
    batch = client.batches.retrieve(batch_id)
    assert batch.request_counts is not None
    return batch.request_counts.completed


def wait_for(true: Callable[[], bool], seconds: float = 120) -> None:
    """Returns when something is true; no answer is not true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(openai.APIError, requests.RequestException):
            if true():
                return
        time.sleep(0.05)
    pytest.fail(f"not true within {seconds:g} s")


def written(state: Path) -> set[bytes]:
    """The lines of results that are on the disk, without one that is half written."""
    files = [path.read_bytes().splitlines(keepends=True) for path in (state / "batches" / "files").iterdir()]
    return {line for lines in files for line in lines if b"batch_req_" in line and line.endswith(b"\n")}


def test_the_process_of_batches_is_killed(fragile: tuple[str, Path]) -> None:
    url, folder = fragile
    client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=8, timeout=60)
    batch = create(client, lines(60))
    wait_for(lambda: completed(client, batch.id) >= 9)
    done = written(folder / "state")
    kill(OWNER)
    check_all(client, batch.id, 60)
    assert done <= written(folder / "state")


def load_deadly() -> dict[str, Any]:
    """A model whose process ends at prompts with an exclamation mark."""
    from tests.tiny import byte_tokenizer, llama

    tokenizer = byte_tokenizer()

    def generate(input_ids: Any, max_new_tokens: int) -> Any:
        if "!" in tokenizer.decode(input_ids[0]):
            os._exit(3)
        time.sleep(0.2)
        return input_ids

    return {"model": llama(), "tokenizer": tokenizer, "generate": generate}


@pytest.mark.long
def test_a_line_that_ends_its_replica_is_given_up(cluster: str, tmp_path: Path) -> None:
    entry = {"id": "a", "loader": f"{__name__}:load_deadly", "engine": {"max_batch_size": 8}}
    with serving(cluster, {"models": [entry], "state_dir": str(tmp_path)}) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8, timeout=60)
        texts = {f"{i}": "die!" if i in (3, 8) else "live" for i in range(12)}
        batch = ended(client, create(client, [request(i, texts[i], model="a") for i in texts]).id, 300)
        assert set(results(client, batch.output_file_id)) == {i for i in texts if texts[i] == "live"}
        errors = results(client, batch.error_file_id)
        assert {i: line["error"]["code"] for i, line in errors.items()} == {"3": "unavailable", "8": "unavailable"}


class Killed:
    """`troupe serve` of a configuration, which can be killed whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self._port}/v1", api_key="none", max_retries=0, timeout=10)
        paced = model("a", folder, pace=0.01, engine={"max_batch_size": 16})
        args = {"models": [paced], "state_dir": "state"}
        application = {"name": "troupe", "route_prefix": "/", "import_path": "deployments.app:build_app", "args": args}
        options = {"ModelReplica": {"num_replicas": 2}, "OpenAIIngress": {"num_replicas": 2}}
        application["deployments"] = [{"name": name, **fields} for name, fields in options.items()]
        http = {"host": "127.0.0.1", "port": self._port}
        (folder / "config.yaml").write_text(yaml.safe_dump({"http_options": http, "applications": [application]}))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when the API answers."""
        command = [sys.executable, "-m", "deployments.cli.main", "serve", str(self._folder / "config.yaml")]
        with (self._folder / "serve.log").open("ab") as log:
            environment = {**os.environ, "RAY_ADDRESS": "", "PYTHONPATH": str(ROOT)}
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        wait_for(lambda: bool(self.client.models.list().data), 180)

    def processes(self, name: str = "") -> list[psutil.Process]:
        """The processes of the server whose command has this in it."""
        assert self._process is not None
        return [
            child
            for child in psutil.Process(self._process.pid).children(recursive=True)
            if name in " ".join(child.cmdline())
        ]

    def kill(self) -> None:
        """Kill everything."""
        assert self._process is not None
        for child in self.processes():
            with contextlib.suppress(psutil.Error):
                child.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Killed]:
    server = Killed(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.long
def test_2000_lines_while_everything_is_killed(killed: Killed, tmp_path: Path, say: Say) -> None:
    client, began = killed.client, time.monotonic()
    batch = create(client, lines(2000))
    state = tmp_path / "state"
    kept: set[bytes] = set()
    for least, name in ((200, "ModelReplica"), (500, "OpenAIIngress"), (800, ""), (1100, "BatchOwner"), (1400, "")):
        wait_for(lambda least=least: len(written(state)) >= least)  # type: ignore[misc]
        kept |= written(state)
        if name:
            killed.processes(name)[0].kill()
        else:
            killed.kill()
            killed.start()
    check_all(client, batch.id, 2000)
    assert kept <= written(state)
    say(f"2000 lines in {time.monotonic() - began:.0f} s, {len(kept)} of them were done before a kill and stayed")


@pytest.mark.long
def test_live_requests_beside_a_batch(say: Say) -> None:
    """The 95th percentile of their first tokens is at most 1.2 times that without a batch."""
    command = [sys.executable, str(ROOT / "scripts" / "bench_beside_batch.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=True)
    (found,) = re.findall(r"^p95 beside a batch / alone: ([0-9.]+)", done.stdout, re.MULTILINE)
    say(done.stdout)
    assert float(found) <= 1.2
