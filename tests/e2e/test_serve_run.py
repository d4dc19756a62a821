"""The two commands as a user types them: a server of its own, before and after the tests' Ray."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from deployments.cli import ports
from deployments.cli.endpoint.processes import free_port
from tests.faults.conftest import Say, say  # noqa: F401
from tests.faults.paced import model
from tests.faults.test_drain import check_end

ROOT = Path(__file__).parent.parent.parent
TESTS_OWN_RAY = "from tests.serving import cluster\nwith cluster(cpus=2, gpus=0) as address: print(address)"


@pytest.fixture
def config(tmp_path: Path) -> tuple[Path, int]:
    """serve_config.yaml on a free port."""
    settings = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    settings["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file, settings["http_options"]["port"]


@pytest.fixture
def fresh_home(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has never used Ray, and chooses no mode."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**environment, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture
def crashed_ray(fresh_home: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a user whose last `ray start` has crashed: its address is still written down."""
    with tempfile.TemporaryDirectory(prefix="tr", dir="/tmp", ignore_cleanup_errors=True) as folder:  # for sockets
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
        yield {**fresh_home, "RAY_TMPDIR": folder}


@contextlib.contextmanager
def running(
    command: list[str], environment: dict[str, str], log: Path, folder: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, ended with all that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def answer(port: int, process: subprocess.Popen[bytes], log: Path) -> str:
    """The demo model's answer, asked as soon as the server can be reached."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                body = {
                    "model": "demo",
                    "temperature": 0,
                    "messages": [{"role": "user", "content": "What is 27 + 45?"}],
                }
                reply = requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
                return str(reply.json()["choices"][0]["message"]["content"])
        time.sleep(0.3)
    pytest.fail(f"no answer; the log ends with\n{log.read_text()[-3000:]}")


NOTED = """
from pathlib import Path
from model_loaders.demo import load_model as demo

def load_model(device, note):
    assert Path(note).read_text() == "here"
    return demo(device)
"""


@pytest.mark.parametrize(
    ("ended_by", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_scripts_serve_after_a_ray_that_crashed_and_one_that_ended(
    config: tuple[Path, int],
    crashed_ray: dict[str, str],
    tmp_path: Path,
    ended_by: signal.Signals,
    status: int,
    say: Say,  # noqa: F811
) -> None:
    """Its paths are relative to the file, an ingress that dies is replaced, and SIGINT ends what runs in background."""
    file, port = config
    (tmp_path / "mine.py").write_text(NOTED)
    (tmp_path / "note.txt").write_text("here")
    settings = yaml.safe_load(file.read_text())
    args = settings["applications"][0]["args"]
    args["models"][0] |= {"loader": "mine.py:load_model", "kwargs": {"note": "note.txt"}, "pinned": True}
    args["models"].append(model("a", pace=0.02, preload=True))
    args["max_models_per_replica"] = 2
    file.write_text(yaml.safe_dump(settings))
    log = tmp_path / "serve.log"
    run = [sys.executable, "-c", TESTS_OWN_RAY]
    subprocess.run(run, cwd=ROOT, env=crashed_ray, check=True, timeout=120, stdout=subprocess.DEVNULL)
    in_background = ["bash", "-c", 'trap "" INT; exec scripts/serve "$0"', str(file)]
    command = in_background if ended_by == signal.SIGINT else ["scripts/serve", str(file)]
    with running(command, {**crashed_ray, "PYTHONPATH": str(ROOT)}, log) as process:
        assert "72" in answer(port, process, log)
        wait_for_the_banner(process, log)
        check_what_listens(process)
        check_who_goes_first(process)
        check_that_the_proxy_calls_by_value(process)
        check_that_a_second_server_is_refused(file, port, crashed_ray)
        ray_env, token = check_that_ray_asks_for_a_token(log.read_text(), crashed_ray)
        check_requests_of_an_ingress_that_is_killed(port, process, log)
        check_end(f"http://127.0.0.1:{port}", process, ended_by, say)
        assert process.wait(60) == status
    assert not ray_env.exists()
    assert not token.parent.exists()
    check_what_is_printed(log.read_text(), port, ended_by.name)


def check_what_is_printed(said: str, port: int, ended_by: str) -> None:
    """A line for each stage, the banner, and a line at the end; all else is in the folder that the banner names."""
    *stages, answers, models, logs, stop, stopped = said.splitlines()
    assert [stage.split()[0] for stage in stages] == ["environment", "Ray", "application", "model"]
    assert stages[-1].startswith("model        demo is loaded (")
    assert answers == f"Troupe answers at http://127.0.0.1:{port}/v1, its page is http://127.0.0.1:{port}/"
    assert models == "  models:    demo (also gpt-3.5-turbo-0613), a"
    assert stop.startswith("  stop:      Ctrl-C, or kill ")
    assert stopped.startswith(f"{ended_by}: finishing running requests, for at most 60 s")
    folder = Path(logs.split()[1].rstrip(";"))
    assert "Started a local Ray instance" in (folder / "server.log").read_text()
    assert any((folder / "ray").iterdir())
    assert [file.name for file in (folder / "serve").glob("replica_*_ModelReplica_*.log")]
    request, *rest = (folder / "requests.log").read_text().splitlines()  # none for /health
    assert all("route=POST" in line for line in rest)
    assert re.search(
        r" request=\S+ route=POST '/v1/chat/completions' status=200 model=demo prompt_tokens=\d+ "
        r"completion_tokens=\d+ seconds=[\d.]+$",
        request,
    )


def open_ports(process: subprocess.Popen[bytes]) -> dict[str, set[str]]:
    """The addresses that a server's processes listen at, by the name of the process."""
    found: dict[str, set[str]] = {}
    root = psutil.Process(process.pid)
    for each in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            for connection in each.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.setdefault(each.name(), set()).add(connection.laddr.ip.removeprefix("::ffff:"))
    return found


def check_what_listens(process: subprocess.Popen[bytes]) -> None:
    """Nothing beyond this machine."""
    found = open_ports(process)
    assert {"gcs_server", "raylet"} <= found.keys()
    assert set().union(*found.values()) == {"127.0.0.1"}, found


def check_who_goes_first(process: subprocess.Popen[bytes]) -> None:
    """The replicas have the priority of other processes, such as the clients on the same machine."""
    root = psutil.Process(process.pid)
    replicas = [each for each in root.children(recursive=True) if "ServeReplica" in " ".join(each.cmdline())]
    assert {each.nice() for each in replicas} == {root.nice()}


def check_that_the_proxy_calls_by_value(process: subprocess.Popen[bytes]) -> None:
    """Over gRPC, not through Ray's object store."""
    (proxy,) = [
        e for e in psutil.Process(process.pid).children(recursive=True) if "ProxyActor" in " ".join(e.cmdline())
    ]
    assert proxy.environ()["RAY_SERVE_PROXY_USE_GRPC"] == "1"


def check_that_a_second_server_is_refused(file: Path, port: int, environment: dict[str, str]) -> None:
    second = subprocess.run(
        ["scripts/serve", str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 2
    assert f"port {port} is taken by process " in second.stderr


def check_that_ray_asks_for_a_token(said: str, environment: dict[str, str]) -> tuple[Path, Path]:
    """`ray.env` in the folder of logs, and the file of the token that it names."""
    (logs,) = re.findall(r"logs: +(\S+); `source ray.env` there", said)
    settings = Path(logs, "ray.env")
    (token,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", settings.read_text())
    assert Path(token).stat().st_mode & 0o777 == 0o600
    for setting, fine in ((f"source {settings}", True), (f"source {settings}; RAY_AUTH_MODE=disabled", False)):
        command = f"{setting}; timeout 20 ray status && timeout 20 serve status"
        status = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
        assert (status.returncode == 0) == fine, status.stderr
        assert ("status: RUNNING" in status.stdout) == fine
    return settings, Path(token)


TORN = "def load_model():\n    raise OSError('torn')\n"


@pytest.mark.parametrize(
    ("deployment", "args", "status", "said"),
    [
        pytest.param(
            {"num_replicas": 2, "ray_actor_options": {"num_gpus": 0, "num_cpus": 4000}},
            {},
            1,
            "Application 'troupe' cannot be deployed: deployment 'ModelReplica' does not fit on this machine: 2 of its "
            "replicas wait for",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {},
            {"api": {"record_dir": "/proc/nothing"}},
            1,
            "Application 'troupe' cannot be deployed: ",
            marks=pytest.mark.long,
        ),
        (
            {},
            {"models": [{"id": "a", "loader": "torn.py:load_model", "pinned": True}]},
            1,
            "Model 'a': Loader torn.py:",
        ),
        (
            {"num_replicas": 3, "ray_actor_options": {"num_gpus": 1}},
            {},
            2,
            "the replicas ask for 3 GPUs, and this mach",
        ),
    ],
    ids=["cpus", "ingress", "model", "gpus"],
)
def test_what_cannot_be_served_ends_the_command_with_one_line(
    config: tuple[Path, int],
    fresh_home: dict[str, str],
    deployment: dict[str, Any],
    args: dict[str, Any],
    status: int,
    said: str,
) -> None:
    file, _ = config
    settings = yaml.safe_load(file.read_text())
    (app,) = settings["applications"]
    app["deployments"] = [{"name": "ModelReplica", **deployment}]
    app["args"] |= args
    file.write_text(yaml.safe_dump(settings))
    file.with_name("torn.py").write_text(TORN)
    done = subprocess.run(
        ["scripts/serve", str(file)], cwd=ROOT, env=fresh_home, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"troupe: {said}")
    assert ("The logs are in " in line) == (status == 1)
    assert ("/proc/nothing" in line) == ("api" in args)


def wait_for_the_banner(process: subprocess.Popen[bytes], log: Path) -> None:
    """A server answers before it has seen that its models are loaded, and says so."""
    deadline = time.monotonic() + 120
    while "  stop: " not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def ask(port: int, **more: Any) -> requests.Response:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **more}
    return requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60, stream="stream" in more)


@pytest.mark.parametrize("deployment", ["ModelReplica", pytest.param("OpenAIIngress", marks=pytest.mark.long)])
def test_what_serve_run_waits_for_is_told_by_http(
    config: tuple[Path, int], crashed_ray: dict[str, str], tmp_path: Path, deployment: str
) -> None:
    """Ray Serve alone would let the requests wait for ever. The command runs elsewhere than in the file's folder."""
    file, port = config
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    settings = yaml.safe_load(file.read_text())
    options = {"name": deployment, "ray_actor_options": {"num_gpus": 0, "num_cpus": 4000}}
    settings["applications"][0]["deployments"] = [options]
    settings["applications"][0]["args"]["api"] = {"record_dir": "records"}
    file.write_text(yaml.safe_dump(settings))
    log, said = tmp_path / "serve.log", ""
    environment = {**crashed_ray, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    environment |= {"RAY_SERVE_SLOW_STARTUP_WARNING_S": "5", "RAY_SERVE_SLOW_STARTUP_WARNING_PERIOD_S": "1"}
    with running(["serve", "run", "../config.yaml"], environment, log, elsewhere) as process:
        deadline = time.monotonic() + 120
        while "4000" not in said and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.5)
            with contextlib.suppress(requests.ConnectionError):
                if (answered := ask(port)).status_code == 404:
                    continue  # Serve's own, until it has read the application
                assert (answered.status_code, answered.headers["retry-after"]) == (503, "5")
                said = answered.json()["error"]["message"]
                assert "cannot answer yet" in said
        assert f"deployment '{deployment}' has no replica: 1 of its replicas wait for" in said, log.read_text()[-3000:]
        health = requests.get(f"http://127.0.0.1:{port}/health", timeout=10)
        assert (health.status_code, health.json()["error"]["type"]) == (503, "server_error")
        assert requests.get(f"http://127.0.0.1:{port}/-/healthz", timeout=10).status_code == 200
        check_what_is_open(port, log)
    assert (tmp_path / "records").is_dir() == (deployment == "ModelReplica")
    assert not list(elsewhere.iterdir())


def check_what_is_open(port: int, log: Path) -> None:
    assert set(ports.listeners(port)) == {"127.0.0.1"}
    assert "anyone who reaches its ports can run code here. Start it with RAY_ENABLE_WINDOWS" in log.read_text()


@pytest.mark.long
def test_requests_of_an_ingress_that_is_killed_end_with_errors(
    config: tuple[Path, int], fresh_home: dict[str, str], tmp_path: Path
) -> None:
    """Of `serve run`, too."""
    file, port = config
    log = tmp_path / "serve.log"
    with running(["serve", "run", str(file)], {**fresh_home, "RAY_ADDRESS": "local"}, log) as process:
        assert "72" in answer(port, process, log)
        check_requests_of_an_ingress_that_is_killed(port, process, log)


def check_requests_of_an_ingress_that_is_killed(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """They end with errors, and another ingress answers."""
    with ThreadPoolExecutor() as threads:
        long = {"max_tokens": 1900, "ignore_eos": True}
        lines = ask(port, **long, stream=True).iter_lines()
        assert next(lines).startswith(b"data: ")
        whole = threads.submit(ask, port, **long)
        while " 2 running" not in requests.get(f"http://127.0.0.1:{port}/health?verbose", timeout=60).text:
            assert not whole.done()
        kill_ingress(process)
        rest = [line for line in lines if line]
        assert rest[-1] == b"data: [DONE]"
        assert json.loads(rest[-2].removeprefix(b"data: "))["error"]["code"] == "unavailable"
        answered = whole.result(90)
        assert (answered.status_code, answered.headers["content-type"]) == (503, "application/json")
        assert answered.json()["error"]["type"] == "server_error"
        assert answered.headers["retry-after"]
        assert "72" in answer(port, process, log)


def kill_ingress(server: subprocess.Popen[bytes]) -> None:
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "OpenAIIngress" in process.cmdline()[0]:
                process.kill()


def test_a_cluster_that_does_not_answer_is_an_error_at_once(
    config: tuple[Path, int], crashed_ray: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli.main", "serve", str(config[0])],
        cwd=ROOT, env={**crashed_ray, "RAY_ADDRESS": "127.0.0.1:9"}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "troupe: RAY_ADDRESS=127.0.0.1:9, but no Ray answers at " in done.stderr  # Ray names the node's own address


def test_a_wrong_configuration_is_told_before_anything_starts(
    config: tuple[Path, int], fresh_home: dict[str, str]
) -> None:
    file, _ = config
    settings = yaml.safe_load(file.read_text())
    settings["applications"][0]["args"]["models"][0]["engin"] = {}
    file.write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        ["scripts/serve", str(file)], cwd=ROOT, env=fresh_home, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "models[0].engin: unknown key (did you mean 'engine'?)" in done.stderr


BESIDE = """
from pathlib import Path
from model_loaders.demo import load_model as demo

def load_model(device: str, note: str):
    return {"model": demo(device).model, "tokenizer": demo(device).tokenizer, "model_name": Path(note).read_text()}
"""


@pytest.mark.long
def test_serve_run_by_hand(crashed_ray: dict[str, str], tmp_path: Path) -> None:
    """It takes paths from the folder of its file, as scripts/serve does; the command runs elsewhere."""
    folder, elsewhere, port = tmp_path / "mine", tmp_path / "elsewhere", free_port()
    folder.mkdir()
    elsewhere.mkdir()
    settings = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    settings["http_options"] = {"host": "127.0.0.1", "port": port}
    (app,) = settings["applications"]
    app["args"]["models"] = [{"id": "demo", "loader": "beside.py:load_model", "kwargs": {"note": "data/note.txt"}}]
    app["args"]["api"] = {"record_dir": "records"}
    (folder / "data").mkdir()
    (folder / "data" / "note.txt").write_text("noted")
    (folder / "beside.py").write_text(BESIDE)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    log, environment = tmp_path / "serve.log", {**crashed_ray, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    with running(["serve", "run", "../mine/config.yaml"], environment, log, elsewhere) as process:
        assert "72" in answer(port, process, log)
        check_what_is_open(port, log)
    assert list((folder / "records").iterdir())
    assert not list(elsewhere.iterdir())
