"""The access log: one line for each request that has ended."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from deployments.logs import LOG_FOLDER, write_access_log
from deployments.openai.http.middleware import ACCESS
from tests.openai.conftest import Server

FIELDS = r"^\S+ \S+ request=(?P<request>\S+) route=(?P<route>\S+ \S+) status=(?P<status>\d+)(?: model=(?P<model>\S+))?"
FIELDS += r"(?: error=(?P<error>\S+))?(?: prompt_tokens=(?P<prompt>\d+) completion_tokens=(?P<completion>\d+))?"
FIELDS += r" seconds=(?P<seconds>[\d.e-]+)$"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the access log, written as the ingress of `troupe serve` writes it."""
    monkeypatch.setenv(LOG_FOLDER, str(tmp_path))
    write_access_log(ACCESS)
    yield tmp_path / "requests.log"
    for handler in ACCESS.handlers:
        handler.close()
    ACCESS.handlers, ACCESS.propagate = [], True
    ACCESS.setLevel(logging.WARNING)


def only_line(log: Path) -> dict[str, Any]:
    """The fields of its line; a client can have its answer before the line is written."""
    end = time.monotonic() + 5
    while not log.read_text() and time.monotonic() < end:
        time.sleep(0.01)
    (line,) = log.read_text().splitlines()
    found = re.fullmatch(FIELDS, line)
    assert found is not None, line
    return found.groupdict()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer(server: Server, log: Path, stream: bool) -> None:
    body = {"model": "org/scripted", "messages": [{"role": "user", "content": "abc"}], "stream": stream}
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, headers={"x-request-id": "mine"}, timeout=9)
    line = only_line(log)
    assert line["request"] == answer.headers["x-request-id"] == "mine"
    assert (line["route"], line["status"]) == ("POST '/v1/chat/completions'", "200")
    assert (line["model"], line["error"]) == ("org/scripted", None)
    assert (int(line["prompt"]), int(line["completion"])) == (len("<user>abc</user>\n<assistant>"), 4)
    assert float(line["seconds"]) > 0


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"prompt": "[fail out_of_memory]"}, "503", "out_of_memory"),
        ({"prompt": "[wait 0.05][after 3 fail model_error]abcdef", "stream": True}, "200", "model_error"),
        ({"prompt": 7}, "400", None),
        ({"prompt": "a", "model": "none"}, "404", None),
    ],
)
def test_an_error(server: Server, log: Path, fields: dict[str, Any], status: str, error: str | None) -> None:
    requests.post(f"{server.url}/v1/completions", json={"model": "org/scripted", **fields}, timeout=9)
    line = only_line(log)
    assert (line["status"], line["error"], line["prompt"]) == (status, error, None)


def test_a_client_that_leaves(server: Server, log: Path) -> None:
    body = {"model": "org/scripted", "prompt": "[wait 0.05]" + "x" * 500, "stream": True}
    with requests.post(f"{server.url}/v1/completions", json=body, stream=True, timeout=9) as answer:
        assert next(answer.iter_lines())
    assert only_line(log)["status"] == "499"


def test_nothing_of_a_path_breaks_a_line_and_health_has_none(server: Server, log: Path) -> None:
    requests.get(f"{server.url}/health", timeout=9)
    requests.get(f"{server.url}/no%0Asuch%1b", timeout=9)
    assert only_line(log)["route"] == r"GET '/no\nsuch\x1b'"


def test_it_is_off_unless_there_is_a_folder(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOG_FOLDER, raising=False)
    write_access_log(ACCESS)
    assert not ACCESS.isEnabledFor(logging.INFO)
