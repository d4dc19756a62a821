"""The server that `python -m deployments.local` starts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import uvicorn
from ray.serve.config import HTTPOptions
from ray.serve.schema import HTTPOptionsSchema

from deployments.core.errors import ConfigError
from deployments.local import run_app, start, stop_all
from model_loaders.demo import load_model
from tests.tiny import byte_tokenizer, llama


def test_idle_connections_outlast_what_clients_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: started.append(server.config))
    run_app("model_loaders.demo:load_model", port=0)
    assert started[0].timeout_keep_alive >= 75


def test_a_taken_port_is_found_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            run_app("no_such_module:load", port=port)


def test_so_do_those_of_ray_serve() -> None:
    """Its proxy, HAProxy in the fast mode, and the servers of replicas there all read this option."""
    for options in (HTTPOptions(), HTTPOptionsSchema()):
        assert options.keep_alive_timeout_s >= 75


def given(**more: Any) -> dict[str, Any]:
    engine = {"kind": "continuous_batching", "threads": 1, "memory_gib": 1}
    return {"model": llama(), "tokenizer": byte_tokenizer(), "plain_chat": True, "engine": engine, **more}


def asked(server: Any, **options: Any) -> str:
    completion = server.client(**options).completions.create(model="model", prompt="abc", max_tokens=8, temperature=0)
    return str(completion.choices[0].text)


def test_a_model_of_a_notebook_is_served_beside_it_and_stays_as_it_was() -> None:
    options = given()
    model, ids = options["model"], torch.tensor([[5, 6, 7]])
    forwards = {name: (vars(part).get("forward"), type(part)) for name, part in model.named_modules()}
    with torch.no_grad():
        before = model(ids).logits
        with start(**options) as server:
            text = asked(server)
            assert torch.allclose(model(ids).logits, before, atol=1e-2)
            assert asked(server) == text
        assert torch.equal(model(ids).logits, before)
    assert forwards == {name: (vars(part).get("forward"), type(part)) for name, part in model.named_modules()}
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/health", timeout=5)
    server.stop()
    assert "stopped" in repr(server)


def test_the_block_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "loaders.md").read_text()
    (block,) = re.findall(r"```python\n([^`]*import start\n[^`]*)```", page)
    info = load_model()
    exec(block, {"model": info.model, "tokenizer": info.tokenizer})
    assert re.match(r"http://127.0.0.1:\d+ \S", capsys.readouterr().out)


def test_two_servers_in_one_program_with_loaders_hooks_and_keys() -> None:
    heard: list[str] = []

    def encode(text: str, **_: Any) -> dict[str, Any]:
        heard.append(text)
        return {"input_ids": torch.tensor([[5, 6, 7]])}

    with (
        start("model_loaders.demo:load_model", id="demo") as demo,
        start(**given(encode=encode, server={"api_keys": ["secret"]})) as hooked,
    ):
        assert demo.url != hooked.url
        assert [each.id for each in demo.client().models.list()] == ["demo"]
        asked(hooked)
        assert "abc" in heard
        assert requests.get(f"{hooked.url}/v1/models", timeout=5).status_code == 401
    assert hooked.client(api_key="other").api_key == "other"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "takes a model and its tokenizer, or a loader"),
        ({"loader": "model_loaders.demo:load_model", "model": object()}, "a model and its tokenizer, or a loader"),
        ({"loader": "model_loaders.demo:load_model", "idd": "a"}, "idd"),
    ],
)
def test_what_cannot_be_started(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        start(**options)


def test_start_finds_a_taken_port_before_the_loader_runs() -> None:
    taken = pytest.raises(ConfigError, match="Address already in use")
    with socket.create_server(("127.0.0.1", 0)) as server, taken:
        start("no_such_module:load", port=server.getsockname()[1])


def test_servers_that_no_variable_refers_to_are_stopped_too() -> None:
    urls = [start(**given()).url for _ in range(2)]
    stop_all()
    for url in urls:
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{url}/health", timeout=5)


def test_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with start("model_loaders.demo:load_model") as server, pytest.raises(ConfigError, match="pip install openai"):
        server.client()


def test_a_stop_id_that_the_model_does_not_have_is_named() -> None:
    with start(**given(stop_token_ids=[2, 10**6])) as server:
        answer = requests.post(f"{server.url}/v1/completions", json={"model": "model", "prompt": "abc"}, timeout=20)
    assert answer.status_code >= 500
    assert "stop_token_ids with 1000000, which does not exist; this model has ids 0 to 260." in answer.text


def test_an_interrupt_while_modules_are_imported_is_one_line(tmp_path: Path) -> None:
    """The module that is imported first sends it."""
    (tmp_path / "uvicorn.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "deployments.local"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "troupe: interrupted.\n")


PROGRAM = """
import asyncio
from deployments.local import start

server = start("model_loaders.demo:load_model")

async def cell():
    return start("model_loaders.demo:load_model", id="second")

second = asyncio.run(cell())
for each in (server, second):
    client = each.client()
    model, longest = client.models.list().data[0].id, {"ignore_eos": True}
    answer = client.completions.create(model=model, prompt="a", max_tokens=2, extra_body=longest)
    print(answer.usage.completion_tokens)
{end}
"""


STREAMING = """
endless = {"ignore_eos": True}
next(iter(client.completions.create(model="second", prompt="a", max_tokens=2000, stream=True, extra_body=endless)))
"""


@pytest.mark.parametrize(
    "end",
    ["", *(pytest.param(end, marks=pytest.mark.long) for end in ("raise SystemExit(0)", "server.stop()", STREAMING))],
)
def test_a_program_ends_without_noise_while_it_serves(end: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{end}", end)], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout.split()) == (0, ["2", "2"])
    assert "Traceback" not in ended.stderr
    assert "terminate called" not in ended.stderr
