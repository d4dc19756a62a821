"""The record of calls."""

from __future__ import annotations

import json
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from deployments.core.errors import ConfigError
from deployments.openai.record.recorder import Recorder
from tests.openai import scripted
from tests.openai.conftest import Serve, Server


def lines(folder: Path, count: int) -> list[dict[str, Any]]:
    """The lines, once there are `count` of them."""
    begun = time.monotonic()
    while True:
        (file,) = folder.glob("*.jsonl")
        found = [json.loads(line) for line in file.read_text().splitlines()]
        if len(found) >= count:
            return found
        assert time.monotonic() - begun < 5
        time.sleep(0.01)


def wait_for(condition: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < 5
        time.sleep(0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "new"


@pytest.fixture(scope="module")
def recording(serve: Serve, folder: Path) -> Server:
    return serve(record_dir=str(folder), api_keys=["secret"])


def post(server: Server, path: str, **body: Any) -> requests.Response:
    headers = {"Authorization": "Bearer secret", "X-Request-ID": "mine"}
    return requests.post(server.url + path, json={"model": "org/scripted", **body}, headers=headers, timeout=5)


def test_a_call_is_a_line(recording: Server, folder: Path) -> None:
    body = {"messages": [{"role": "user", "content": "né"}], "temperature": 0, "user": "u"}
    answer = post(recording, "/v1/chat/completions", **body).json()
    line = lines(folder, 1)[-1]
    assert line["id"] == answer["id"]
    assert line["request_id"] == "mine"
    assert line["path"] == "/v1/chat/completions"
    assert line["request"] == {"model": "org/scripted", **body}
    assert line["prompts"] == [
        {"text": "<user>né</user>\n<assistant>", "token_ids": list(map(ord, "<user>né</user>\n<assistant>"))}
    ]
    (choice,) = line["choices"]
    assert (choice["text"], choice["token_ids"]) == ("né", [ord("n"), ord("é"), 0])
    assert choice["finish_reason"] == "stop"
    assert line["usage"]["completion_tokens"] == 3
    assert line["sampling"]["temperature"] == 0
    assert 0 <= line["seconds"]["accepted"] <= line["seconds"]["first"] <= line["seconds"]["finished"]
    assert line["error"] is None
    assert "secret" not in json.dumps(line)


def test_streams_and_failures_are_lines(recording: Server, folder: Path) -> None:
    before = len(lines(folder, 0))
    assert post(recording, "/v1/completions", prompt=["a", "b"], stream=True, logprobs=1).status_code == 200
    line = lines(folder, before + 1)[-1]
    assert [choice["text"] for choice in line["choices"]] == ["a", "b"]
    assert line["choices"][0]["logprobs"] == [-0.25, -0.25]
    assert post(recording, "/v1/completions", prompt="[fail out_of_memory]").status_code == 503
    assert lines(folder, before + 2)[-1]["error"]["code"] == "out_of_memory"


def test_a_call_given_up_is_a_line(recording: Server, folder: Path) -> None:
    before, begun = len(lines(folder, 0)), len(scripted.ENGINES)
    with pytest.raises(requests.Timeout):
        requests.post(
            recording.url + "/v1/completions",
            json={"model": "org/scripted", "prompt": "[wait 0.1]abcdefgh"},
            headers={"Authorization": "Bearer secret"},
            timeout=0.35,
        )
    line = lines(folder, before + 1)[-1]
    assert begun
    assert (line["usage"], line["error"]) == (None, None)
    assert line["seconds"].keys() >= {"accepted", "finished"}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="record_dir"):
        Recorder(str(tmp_path / "file" / "records"), 1024)


def test_a_large_file_is_followed_by_a_new_one_and_only_this_user_reads_them(serve: Serve, tmp_path: Path) -> None:
    server = serve(record_dir=str(tmp_path), record_max_bytes=1024, api_keys=["secret"])
    for number in range(4):
        post(server, "/v1/completions", prompt="x" * 300, user=str(number)).raise_for_status()
    wait_for(lambda: sum(len(file.read_text().splitlines()) for file in tmp_path.iterdir()) == 4)
    found = [json.loads(line) for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert {line["request"]["user"] for line in found} == {"0", "1", "2", "3"}
    assert len(list(tmp_path.glob("*.jsonl"))) == 4
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_a_full_disk_is_reported_once_and_counted(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(record_dir=str(tmp_path), api_keys=["secret"])
    (file,) = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        post(server, "/v1/completions", prompt="before").raise_for_status()
        lines(tmp_path, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, hard))
        for _ in range(3):
            post(server, "/v1/completions", prompt="lost").raise_for_status()
        wait_for(lambda: "no longer recorded" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    post(server, "/v1/completions", prompt="after").raise_for_status()
    wait_for(lambda: "Calls are recorded again" in caplog.text)
    lost = int(re.findall(r"recorded again; (\d) were lost", caplog.text)[0])
    prompts = [line["request"]["prompt"] for line in lines(tmp_path, 5 - lost)]
    assert prompts == ["before", *["lost"] * (3 - lost), "after"]
    assert caplog.text.count("no longer recorded") == 1


def test_every_field_is_documented(serve: Serve, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/reference/record.md").read_text()
    documented = {
        name for row in re.findall(r"^\| (.+?) \|", page, re.MULTILINE) for name in re.findall("`(.+?)`", row)
    }
    model = {
        "id": "tiny",
        "loader": "tests.openai.tiny_models:load_model",
        "variants": {"tiny+cold": {"temperature": 0}},
    }
    server = serve([model], record_dir=str(tmp_path), resume=True, api_keys=["secret"])
    answer = post(server, "/v1/completions", model="tiny+cold", prompt="a", logprobs=1, prompt_logprobs=0, echo=True)
    assert answer.status_code == 200, answer.text
    (line,) = lines(tmp_path, 1)
    fields = {*line, *line["choices"][0]}
    assert {"tokens", "prompt_tokens"} < fields
    assert fields == documented
    assert all(
        f"`{name}`" in page for name in (*line["seconds"], *line["usage"], *line["prompts"][0], "code", "status")
    )
