"""The Dockerfile without a container engine: linted, and its steps carried out in a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import yaml

from deployments.cli import ports
from deployments.compat.flags import FLAGS
from tests.serving import free_port
from tests.tiny import byte_tokenizer, llama

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
# What the image downloads is here already: this Python and its packages.
PACKAGES = {
    "PYTHONPATH": str(Path(yaml.__file__).parent.parent),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
STEPS = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE))


def steps(instruction: str) -> list[str]:
    """The arguments of every step of a kind, in order."""
    return [line.strip() for line in re.findall(rf"^{instruction} (.*)$", STEPS, re.MULTILINE)]


def variables() -> dict[str, str]:
    """What the stages set, the model's stage included."""
    return dict(pair.split("=", 1) for step in steps("ENV") for pair in step.split())


def test_it_is_clean() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_holds_no_model_and_runs_as_nobody() -> None:
    first = STEPS.split("FROM ")[1]
    assert "HF_MODEL" not in first
    assert "snapshot_download" not in STEPS
    assert steps("USER") == ["10001"]
    assert steps("VOLUME") == [variables()["HF_HOME"]]
    assert steps("FROM")[-1] == "troupe"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The working directory of the image: what is copied, and the environment that is made in it."""
    app = tmp_path / "app"
    app.mkdir()
    for step in steps("COPY"):
        *sources, target = [word for word in step.split() if not word.startswith("--")]
        if "--from=" in step:
            continue
        for source in sources:
            place = app if target == "./" else app / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    (install,) = [step for step in steps("RUN") if "venv .venv" in step]
    offline = {**os.environ, **PACKAGES, "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    subprocess.run(["bash", "-o", "pipefail", "-c", install], cwd=app, env=offline, check=True)
    return app


def test_the_image_with_a_model_serves_it(image: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    llama(max_position_embeddings=128).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    own = {**variables(), "HF_MODEL": str(model), "HF_HOME": str(tmp_path / "cache"), "PORT": str(free_port())}
    container = {"HOSTNAME": "3f2a91c0de11", "HOME": str(tmp_path), "ACCELERATOR_TYPE": "cpu", "MAX_CONCURRENT": "4"}
    others = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {**others, **PACKAGES, **container, **own}
    (entry,) = steps("ENTRYPOINT")
    (check,) = re.findall(r"CMD (\[.*\])", steps("HEALTHCHECK")[0])
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            json.loads(entry),
            cwd=image,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 180
        while subprocess.run(json.loads(check), env=environment, capture_output=True).returncode != 0:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "ignore_eos": True}
        assert set(ports.listeners(int(own["PORT"]))) == {"0.0.0.0"}  # reached from outside of its container
        url = f"http://127.0.0.1:{own['PORT']}/v1/chat/completions"
        assert requests.post(url, json=body, timeout=120).json()["usage"]["completion_tokens"] == 3
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def test_the_compose_file() -> None:
    compose = yaml.safe_load((ROOT / "docs" / "docker-compose.yaml").read_text())
    (service,) = compose["services"].values()
    assert (ROOT / "docs" / service["build"]["context"] / service["build"]["dockerfile"]).samefile(ROOT / "Dockerfile")
    assert set(service["environment"]) - {flag.env for flag in FLAGS} == {"HF_TOKEN"}
    assert service["volumes"][0].split(":")[-1] == variables()["HF_HOME"]
    host, _, inside = service["ports"][0].rpartition(":")
    assert host.startswith("127.0.0.1:")
    assert inside == variables()["PORT"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
