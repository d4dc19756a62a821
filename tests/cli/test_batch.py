"""`troupe batch`: the requests of a file are sent, and each answer is written once, however often it is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cli.main import main
from tests.openai.batches.batching import jsonl, request
from tests.openai.conftest import MODELS, Server

ROOT = Path(__file__).parent.parent.parent
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server({"api_keys": ["key"]}, MODELS)
    running.start()
    yield running
    running.stop()


def run(*arguments: str) -> int:
    """The exit status of `troupe batch`, in this process, whose folder it may change."""
    with contextlib.chdir("."), pytest.raises(SystemExit) as end:
        main(["batch", *arguments])
    return int(end.value.code or 0)


def answers(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of an output file by custom_id, each once."""
    lines = list(map(json.loads, path.read_text().splitlines()))
    found = {str(line["custom_id"]): line for line in lines}
    assert len(found) == len(lines)
    return found


def test_every_line_is_answered(server: Server, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "in.jsonl"
    texts = {
        "custom_id": "text",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "ab", "model": "merging"},
    }
    file.write_bytes(jsonl([*(request(f"{i}", f"text {i}") for i in range(10)), texts]))
    assert run(str(file), "--url", server.url, "--api-key", "key") == 0
    out = tmp_path / "in.out.jsonl"
    assert capsys.readouterr().out == f"11 of 11 lines are in {out}; 0 have errors.\n"
    found = answers(out)
    assert found["3"]["response"]["body"]["choices"][0]["message"]["content"] == "text 3"
    assert found["text"]["response"]["body"]["choices"][0]["text"] == "ab"
    assert run(str(file), "--url", server.url) == 2
    assert "in.out.jsonl exists; continue it with --resume" in capsys.readouterr().err


def test_bad_lines_and_another_model(server: Server, tmp_path: Path, capsys: Capture) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(jsonl([request("good", "x", model="none"), "{", request("bad", "x", temperature=-1)]))
    asked = (str(file), "-o", str(out), "--url", f"{server.url}/v1", "--api-key", "key", "--ask", "org/scripted")
    assert run(*asked) == 1
    found = answers(out)
    assert {name: (line["error"] or {}).get("code") for name, line in found.items()} == {
        "good": None,
        "None": "invalid_json_line",
        "bad": "invalid_value",
    }
    capsys.readouterr()
    assert run(*asked, "--resume") == 1
    summary = f"3 of 3 lines are in {out}, 3 of them before; 2 have errors. Send these again with --retry-failed.\n"
    assert capsys.readouterr().out == summary
    assert list(answers(out))[-1] == "None"  # what is not sent comes last


def test_failed_lines_are_sent_again(server: Server, tmp_path: Path, capsys: Capture) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(jsonl([request("a", "x", model="none"), request("b", "y"), request("c", "z", model="none")]))
    asked = (str(file), "-o", str(out), "--url", server.url, "--api-key", "key")
    assert run(*asked) == 1
    first = out.read_text().splitlines()
    assert run(*asked, "--retry-failed", "--ask", "org/scripted") == 0
    assert f"3 of 3 lines are in {out}, 1 of them before; 0 have errors." in capsys.readouterr().out
    assert next(line for line in first if '"b"' in line) == out.read_text().splitlines()[0]
    assert sorted(answers(out)) == ["a", "b", "c"]


def test_what_no_line_can_be_answered_with_ends_the_command(server: Server, tmp_path: Path, capsys: Capture) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(jsonl([request("a", "x"), "{"]))
    asked = (str(file), "-o", str(out), "--url", server.url)
    for options, said in (
        (("--api-key", "other"), "refuses the key. Give another with --api-key. ("),
        (("--api-key", "key", "--ask", "none"), "--ask none: The model 'none' does not exist."),
    ):
        assert run(*asked, *options) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()
    assert run(*asked, "--api-key", "key") == 1


def test_ctrl_c_and_resume(server: Server, tmp_path: Path, capsys: Capture) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(jsonl([request(f"{i}", "[wait 0.02]words") for i in range(40)]))
    command = [sys.executable, "-m", "deployments.cli.main", "batch", str(file), "-o", str(out), "--url", server.url]
    command += ["--concurrency", "2", "--api-key", "key"]
    # A test run in the background ignores the signal, and so would its children.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=os.environ, text=True, **heard)
    while not out.exists() or len(out.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Continue with --resume." in error
    before = out.read_text().splitlines()
    assert 3 <= len(before) < 40
    out.write_text("".join(line + "\n" for line in before) + '{"id": "batch_req_')  # as a crash leaves it
    assert run(str(file), "-o", str(out), "--url", server.url, "--api-key", "key", "--resume") == 0
    assert f"40 of 40 lines are in {out}, {len(before)} of them before" in capsys.readouterr().out
    assert out.read_text().splitlines()[: len(before)] == before
    assert set(answers(out)) == {f"{i}" for i in range(40)}


def test_models_of_this_process(tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(jsonl([request("a", "x", model="org/scripted")]))
    args = {"models": MODELS, "max_models_per_replica": 2, "state_dir": "state"}
    application = {"name": "troupe", "import_path": "deployments.app:build_app", "args": args}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    assert run(str(file), "-o", str(out), "--model", str(tmp_path / "config.yaml")) == 0
    assert answers(out)["a"]["response"]["status_code"] == 200
    assert not (tmp_path / "state").exists()  # which the server has that may run


def test_mistakes(server: Server, tmp_path: Path, capsys: Capture) -> None:
    file, other = tmp_path / "in.jsonl", tmp_path / "other.jsonl"
    file.write_bytes(jsonl([request("a", "x")]))
    other.write_text('{"id": "batch_req_00_1"}\n')
    (tmp_path / "empty.jsonl").touch()
    for arguments, said in (
        ([str(tmp_path / "none.jsonl"), "--url", server.url], "none.jsonl cannot be read: No such file"),
        ([str(tmp_path / "empty.jsonl"), "--url", server.url], "has no requests"),
        ([str(file), "-o", str(file), "--url", server.url], "is the input itself"),
        ([str(file), "-o", str(other), "--url", server.url, "--resume"], "has results of another file"),
        ([str(file), "-o", str(tmp_path / "no" / "out"), "--url", server.url], "out cannot be written"),
        (
            [str(file), "-o", str(tmp_path / "o"), "--url", "http://127.0.0.1:9"],
            "http://127.0.0.1:9/v1/ does not answer",
        ),
        ([str(file), "--url", "http://a", "--model", "b"], "--url or --model"),
        ([str(file), "--url", "nohost:1"], "--url 'nohost:1' should be a URL such as http://127.0.0.1:8000."),
    ):
        assert run(*arguments, "--api-key", "key") == 2
        assert said in capsys.readouterr().err
