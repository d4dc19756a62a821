"""The Dockerfile without a container engine: linted, and its steps carried out in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from deployments.cli import ports
from deployments.cli.endpoint.processes import free_port
from deployments.compat.flags import FLAGS
from tests.model_loaders.backends.tritonserver import TritonServer, make_repository
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


def variables(*, with_model: bool = False) -> dict[str, str]:
    """What the image sets, or the one with a model inside."""
    pairs = [pair.split("=", 1) for step in steps("ENV") for pair in step.split()]
    return {name: value for name, value in pairs if with_model or name not in ("HF_MODEL", "HF_HUB_OFFLINE")}


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


def build(app: Path, environment: dict[str, str]) -> Path:
    """The working directory of the image: what is copied, and the environment that is made in it."""
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
    subprocess.run(["bash", "-o", "pipefail", "-c", install], cwd=app, env=environment, check=True)
    return app


def test_the_context_is_what_it_copies() -> None:
    """.dockerignore leaves out the rest: an environment beside it has gigabytes."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {
        name
        for step in steps("COPY")
        if "--from=" not in step
        for name in [word for word in step.split() if not word.startswith("--")][:-1]
    }
    assert lines[1] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied


def environment_of(folder: Path, set_by_user: dict[str, str], **packages: str) -> dict[str, str]:
    """The variables in a container: those of the machine, of the image and of the user."""
    own = {
        **variables(with_model="HF_MODEL" in set_by_user),
        "HF_HOME": str(folder / "cache"),
        "PORT": str(free_port()),
    }
    machine = {"HOSTNAME": "3f2a91c0de11", "HOME": str(folder), "ACCELERATOR_TYPE": "cpu"}
    others = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "PYTHONPATH"}
    return {**others, **packages, **machine, **own, **set_by_user}


@contextlib.contextmanager
def container(
    image: Path, folder: Path, set_by_user: dict[str, str], arguments: Sequence[str] = (), **packages: str
) -> Iterator[str]:
    """The container's command with these arguments and variables, once its health check passes; yields the address."""
    environment = environment_of(folder, set_by_user, **packages)
    port = environment.get("TROUPE_PORT", environment["PORT"])
    (entry,) = steps("ENTRYPOINT")
    (check,) = re.findall(r"CMD (\[.*\])", steps("HEALTHCHECK")[0])
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*json.loads(entry), *arguments],
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
        assert set(ports.listeners(int(port))) == {"0.0.0.0"}  # reached from outside of its container
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def tokens_of_a_chat(url: str, **fields: Any) -> int:
    """How many tokens a chat of at most three has."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "ignore_eos": True, **fields}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("checkpoint")
    llama(max_position_embeddings=128).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    return model


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image, whose packages are those that are here."""
    offline = {**os.environ, **PACKAGES, "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    return build(tmp_path_factory.mktemp("image") / "app", offline)


def test_the_image_with_a_model_is_configured_for_it(image: Path, checkpoint: Path, tmp_path: Path) -> None:
    environment = environment_of(tmp_path, {"HF_MODEL": str(checkpoint), "MAX_CONCURRENT": "4"}, **PACKAGES)
    command = [*json.loads(steps("ENTRYPOINT")[0]), "--print-config"]
    printed = subprocess.run(command, cwd=image, env=environment, capture_output=True, text=True, check=True).stdout
    config = yaml.safe_load(printed)
    assert config["http_options"]["port"] == int(environment["PORT"])
    (entry,) = config["applications"][0]["args"]["models"]
    assert (entry["kwargs"]["model_name"], entry["engine"]["max_batch_size"]) == (str(checkpoint), 4)


@pytest.mark.long
def test_the_image_with_a_model_serves_it(image: Path, checkpoint: Path, tmp_path: Path) -> None:
    set_by_user = {"HF_MODEL": str(checkpoint), "MAX_CONCURRENT": "4"}
    with container(image, tmp_path, set_by_user, **PACKAGES) as url:
        assert tokens_of_a_chat(url) == 3


def test_it_has_what_every_backend_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"--editable '\.\[([a-z0-9,]+)\]'", STEPS)
    assert set(extras.split(",")) == set(project["optional-dependencies"]) - {"dev"}


@pytest.fixture(scope="module")
def fresh_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image with an environment of its own, which has what its step installs and nothing else."""
    python = Path(sys.base_prefix) / "bin"
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**inherited, "PATH": f"{python}:/usr/local/bin:/usr/bin:/bin"}
    return build(tmp_path_factory.mktemp("fresh") / "app", environment)


@pytest.mark.long
def test_a_fresh_image_serves_a_model_by_its_name(fresh_image: Path, checkpoint: Path, tmp_path: Path) -> None:
    """And it has every package that the extras name, but no tool of development."""
    set_by_user = {"TROUPE_PORT": str(free_port())}
    with container(fresh_image, tmp_path, set_by_user, [str(checkpoint), "--gpus", "0"]) as url:
        assert tokens_of_a_chat(url) == 3
    python = fresh_image / ".venv" / "bin" / "python"
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True).stdout
    names = {each["name"].lower() for each in json.loads(listed)}
    assert {"bitsandbytes", "ctranslate2", "peft", "tritonclient"} <= names
    assert names & {"pytest", "mypy", "ruff", "playwright", "mkdocs-material"} == set()


@pytest.mark.long
def test_a_fresh_image_serves_a_model_of_triton(fresh_image: Path, checkpoint: Path, tmp_path: Path) -> None:
    triton = TritonServer(make_repository(tmp_path / "repository", checkpoint), free_port(), "tensorrt_llm")
    triton.start()
    try:
        host, _, port = triton.url.partition(":")
        set_by_user = {
            "TOKENIZER_PATH": str(checkpoint), "TRITON_SERVER_HOST": host, "TRITON_SERVER_PORT": port,
            "MODEL_TYPE": "qwen2-chat", "WORKERS": "4",
        }  # fmt: skip
        with container(fresh_image, tmp_path, set_by_user) as url:
            assert tokens_of_a_chat(url, model="gpt-3.5-turbo") == 3
            body = {"prompt": "who are you?", "max_output_len": 4}
            assert requests.post(f"{url}/generate", json=body, timeout=120).json().keys() == {"text", "id"}
    finally:
        triton.stop()


@pytest.mark.long
@pytest.mark.parametrize("variable", ["LLM_ARTIFACT_DIR", "HF_MODEL"], ids=["named", "injected"])
def test_a_fresh_image_serves_a_model_of_ctranslate2(
    fresh_image: Path, checkpoint: Path, tmp_path: Path, variable: str
) -> None:
    convert = [sys.executable, ROOT / "scripts" / "convert_ctranslate2", checkpoint, tmp_path / "converted"]
    subprocess.run(convert, check=True, capture_output=True)
    with container(fresh_image, tmp_path, {variable: str(tmp_path / "converted")}) as url:
        assert tokens_of_a_chat(url) == 3
        completed = requests.post(f"{url}/completions", json={"prompt": "hi", "max_tokens": 3}, timeout=120)
        assert completed.json()["choices"][0]["text"] is not None


def test_the_compose_file() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    (service,) = compose["services"].values()
    assert service["build"] == "."
    assert set(service["environment"]) - {flag.env for flag in FLAGS} == {"HF_TOKEN", "TROUPE_PORT"}
    assert service["volumes"][0].split(":")[-1] == variables()["HF_HOME"]
    host, _, inside = service["ports"][0].rpartition(":")
    assert host == "127.0.0.1:${PORT:-7088}"  # where clients of transformers-openai-api look
    assert inside == str(service["environment"]["TROUPE_PORT"]) == "7088"
    assert {"8000", "7088", "9900"} == set(steps("EXPOSE")[0].split())
    assert "PORT" not in variables()
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
