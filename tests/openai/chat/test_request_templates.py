"""Chat templates of requests: each is rendered where it can be ended, and takes nothing from other requests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.forms import some
from tests.openai.conftest import Server
from tests.openai.templates import TEMPLATES

Serve = Callable[..., Server]
USER = {"role": "user", "content": "go"}
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
FOREVER = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
LIMIT_S = 1

RUNAWAYS = {
    "a loop": (FOREVER + TURNS, "chat_template_timeout_s"),
    "a loop after the messages": (TURNS + FOREVER, "chat_template_timeout_s"),
    "one large number, without a step in Python": ("{{ 10 ** (10 ** 9) }}" + TURNS, "chat_template_timeout_s"),
    "comments that never end": ("{#" * 32_000, "chat_template_timeout_s"),
    "one large text": ("{{ 'a' * 10 ** 10 }}" + TURNS, "chat_template_max_bytes"),
    "a large text of no length": ("{% set a = ' ' * 10 ** 10 %}" + TURNS, "chat_template_max_bytes"),
    "a text that doubles": (
        "{% set n = namespace(a='ab') %}{% for i in range(50) %}{% set n.a = n.a + n.a %}{% endfor %}" + TURNS,
        "chat_template_max_bytes",
    ),
    "a large list": ("{% set a = [1] * 10 ** 9 %}" + TURNS, "chat_template_max_bytes"),
    "a large page": ("{{ 'a'.center(10 ** 10) }}" + TURNS, "chat_template_max_bytes"),
    "a prompt that is too long": ("{{ 'a' * 3000000 }}" + TURNS, "max_body_bytes"),
    "an endless macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + TURNS, "without end"),
    "half of a pair": ("{{ '\\ud800' }}" + TURNS, "surrogate"),
    "brackets without end": ("{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}" + TURNS, "nested too deeply"),
    "no template": ("{% for m in messages %}", "Jinja"),
}
ALIKE = {"a loop after the messages", "one large text", "a large list", "a large page"}
"""Those that end as others do."""


@pytest.fixture(scope="module")
def secret() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TROUPE_TEST_KEY", "secret")
        yield


@pytest.fixture(scope="module")
def server(serve: Serve, secret: None) -> Server:
    engine = {"pack_linears": False, "threads": 1}
    models: list[dict[str, Any]] = [
        {"id": "any", "loader": "tests.openai.tiny_models:load_model"},
        {"id": "function", "loader": "tests.openai.templates:load_function", "kwargs": {"kind": "whole"}},
        {"id": "plain", "loader": "tests.openai.templates:load_plain"},
        *(
            {"id": style, "loader": "tests.openai.templates:load_template", "kwargs": {"style": style}}
            for style in ("llama2", "hermes", "parts")
        ),
    ]
    return serve(
        [{**model, "engine": engine} for model in models],
        allow_request_chat_template=True,
        chat_template_timeout_s=LIMIT_S,
        max_body_bytes=2**21,
    )


def ask(server: Server, model: str = "any", route: str = "/v1/chat/completions/render", **fields: Any) -> Any:
    """The answer to a conversation."""
    body = {"model": model, "messages": [USER], **fields}
    return requests.post(server.url + route, json=body, timeout=120)


def renderers(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes that render templates."""
    children = (parent or psutil.Process()).children(recursive=True)
    return [each for each in children if "model_loaders.prompts.request_template" in command(each)]


def command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@some("name", RUNAWAYS, RUNAWAYS.keys() - ALIKE)
def test_a_template_that_takes_too_much_is_a_400(server: Server, name: str) -> None:
    template, why = RUNAWAYS[name]
    answer = ask(server, chat_template=template)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "chat_template", "chat_template_error")
    assert "'chat_template'" in error["message"]
    assert why in error["message"]


@pytest.mark.parametrize("route", ["/tokenize", "/v1/chat/completions", "/v1/embeddings"])
def test_on_every_route(server: Server, route: str) -> None:
    error = ask(server, route=route, chat_template="{{ 'a' * 10 ** 10 }}").json()["error"]
    assert error["param"] == "chat_template"
    assert ask(server, route=route, chat_template=TURNS).status_code == 200


def test_others_are_answered_while_templates_loop(server: Server) -> None:
    """More of them than there are processes; the same model answers everything else meanwhile."""
    ask(server, chat_template=TURNS)
    answers: list[int] = []
    loops = [
        threading.Thread(target=lambda: answers.append(ask(server, chat_template=FOREVER).status_code))
        for _ in range(3)
    ]
    for each in loops:
        each.start()
    before = busy()
    while busy() < before + 0.2:
        pass
    for route in ("/v1/chat/completions/render", "/tokenize", "/v1/chat/completions"):
        assert (
            ask(server, route=route, max_tokens=2).status_code == 200 if "chat" in route else ask(server, route=route)
        )
    assert answers == []
    for each in loops:
        each.join()
    assert answers == [400] * 3
    assert ask(server, chat_template=TURNS).json()["prompt"] == "<user>go"


def busy() -> float:
    """Seconds of processor time of the processes that live."""
    found = 0.0
    for each in renderers():
        try:
            found += each.cpu_times().user
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("style", ["llama2", "hermes", "parts"])
def test_the_prompt_is_that_of_a_model_with_the_template(server: Server, style: str) -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]}
    messages = [system, USER, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "ü <b>"}]
    for fields in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"bos_token": "B"}}):
        own = ask(server, style, messages=messages, **fields).json()
        brought = ask(server, messages=messages, chat_template=TEMPLATES[style], **fields).json()
        assert brought["prompt"] == own["prompt"]


@pytest.mark.parametrize("model", ["any", "function", "plain"])
def test_it_replaces_what_writes_the_prompts(server: Server, model: str) -> None:
    assert ask(server, model, chat_template=TURNS).json()["prompt"] == "<user>go"


def test_the_process_has_no_secrets_and_no_sockets(server: Server) -> None:
    ask(server, chat_template=TURNS)
    (process, *_) = renderers()
    environment = process.environ()
    assert "TROUPE_TEST_KEY" not in environment
    assert not [name for name in environment if name.startswith(("RAY", "HF_TOKEN", "OPENAI"))]
    files = {os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()}
    assert all(name.startswith("pipe:") or name.endswith("(deleted)") for name in files), files
    assert not process.net_connections()
    assert os.getsid(process.pid) != os.getsid(0)


SERVING = f"""
import asyncio, sys
from deployments.core.calls import ChatPrompt
from deployments.host.template_processes import RenderLimits, TemplateProcesses
from model_loaders.contract import ModelInfo

async def main():
    processes = TemplateProcesses(RenderLimits(seconds=600))
    chats = [ChatPrompt(messages=[{USER}], chat_template=each) for each in ({TURNS!r}, sys.argv[1])]
    print(await processes.render(ModelInfo(), chats[0]), flush=True)
    await processes.render(ModelInfo(), chats[1])

asyncio.run(main())
"""


@pytest.fixture
def serving() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started = []

    def start(template: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen([sys.executable, "-c", SERVING, template], stdout=subprocess.PIPE, text=True, bufsize=1)
        )
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


@pytest.mark.parametrize("template", [FOREVER, "{{ 10 ** (10 ** 9) }}"])
def test_it_ends_with_its_parent(serving: Callable[[str], subprocess.Popen[str]], template: str) -> None:
    """Although it is busy, in Python or in C, and has much time left."""
    parent = serving(template)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "<user>go\n"
    (child,) = renderers(psutil.Process(parent.pid))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    child.wait(60)


def test_the_host_ends_it(serve: Serve) -> None:
    model = {"id": "any", "loader": "tests.openai.tiny_models:load_model", "engine": {"threads": 1}}
    known = {each.pid for each in renderers()}
    server = serve([model], allow_request_chat_template=True)
    ask(server, chat_template=TURNS)
    started = [each for each in renderers() if each.pid not in known]
    assert started
    server.stop()
    assert not psutil.wait_procs(started, 60)[1]
