"""The two commands as a user types them: a server of its own, before and after the tests' Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml

from tests.serving import free_port

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
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, ended with all that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
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


def test_scripts_serve_before_and_after_the_tests_own_ray(
    config: tuple[Path, int], crashed_ray: dict[str, str], tmp_path: Path
) -> None:
    file, port = config
    log = tmp_path / "serve.log"
    for _ in ("before", "after"):
        with running(["scripts/serve", str(file)], crashed_ray, log) as process:
            assert "72" in answer(port, process, log)
        said = log.read_text()
        assert f"Troupe answers at http://127.0.0.1:{port}/v1" in said
        assert "models: demo (also gpt-3.5-turbo-0613)" in said
        assert "curl http://127.0.0.1" in said
        subprocess.run(
            [sys.executable, "-c", TESTS_OWN_RAY],
            cwd=ROOT,
            env={**crashed_ray, "RAY_AUTH_MODE": "disabled"},
            check=True,
            timeout=120,
            stdout=subprocess.DEVNULL,
        )


def test_serve_run_by_hand(config: tuple[Path, int], crashed_ray: dict[str, str], tmp_path: Path) -> None:
    file, port = config
    log = tmp_path / "serve.log"
    with running(["serve", "run", str(file)], {**crashed_ray, "RAY_ADDRESS": "local"}, log) as process:
        assert "72" in answer(port, process, log)


def test_a_cluster_that_does_not_answer_is_an_error_at_once(
    config: tuple[Path, int], crashed_ray: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deployments.drain", str(config[0])],
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
