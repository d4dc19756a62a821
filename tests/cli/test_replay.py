"""`troupe replay`: recorded calls are sent again, and the first token that differs is shown."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from deployments.cli.main import main
from tests.openai.conftest import Server

LOADER = "tests.openai.tiny_models:load_model"
MUTE = {"interventions": [{"module": "model.norm", "op": "zero"}]}
TINY = {
    "id": "tiny",
    "loader": LOADER,
    "engine": {"pack_linears": False, "threads": 1},
    "variants": {"tiny+mute": MUTE},
}
MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CALLS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": MESSAGES, "temperature": 0, "max_tokens": 6, "logprobs": True}),
    (CHAT, {"messages": MESSAGES, "seed": 7, "max_tokens": 6, "n": 2, "stream": True}),
    (TEXT, {"prompt": ["a", "bc"], "temperature": 0, "max_tokens": 4, "n": 1}),
    (TEXT, {"prompt": [1, 2, 3], "seed": 3, "max_tokens": 4, "n": 2}),
    (TEXT, {"prompt": "sampled", "max_tokens": 4}),
    ("/v1/responses", {"input": "Hello", "temperature": 0, "max_output_tokens": 4}),
]
REPLAYED = 4

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server that would answer from the record if it were not told otherwise."""
    running = Server({"record_dir": str(folder), "resume": True}, [TINY])
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def record(server: Server, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the record of `CALLS`."""
    for path, body in CALLS:
        requests.post(server.url + path, json={"model": "tiny", **body}, timeout=30).raise_for_status()
    lines = wait_for_lines(folder, len(CALLS))
    copy = tmp_path_factory.mktemp("copy") / "calls-copy.jsonl"
    copy.write_text("".join(line + "\n" for line in lines))
    return copy


def wait_for_lines(folder: Path, count: int) -> list[str]:
    """The lines of the server's record, once there are so many."""
    (file,) = folder.glob("calls-*.jsonl")
    begun = time.monotonic()
    while len(lines := file.read_text().splitlines()) < count:
        assert time.monotonic() - begun < 10
        time.sleep(0.01)
    return lines


def run(*arguments: str) -> int:
    """The exit status of `troupe replay`, in this process, whose folder it may change."""
    with contextlib.chdir("."), pytest.raises(SystemExit) as end:
        main(["replay", *arguments])
    return int(end.value.code or 0)


def changed(record: Path, folder: Path, number: int, change: Any) -> Path:
    """A record whose line of this number is another."""
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    change(lines[number])
    copy = folder / "calls-changed.jsonl"
    copy.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


def test_the_same_server_gives_the_same_answers(server: Server, record: Path, folder: Path, capsys: Capture) -> None:
    before = len(list(folder.glob("*"))), sum(file.stat().st_size for file in folder.iterdir())
    assert run(str(record), "--url", server.url) == 0
    out = capsys.readouterr().out
    assert f"{REPLAYED} replayed: {REPLAYED} equal, 0 different, 0 failed.\n" in out
    assert "Not replayed: 1 sampled without a seed.\n" in out
    assert "Not replayed: 1 of a route that is not replayed.\n" in out
    assert sum(file.stat().st_size for file in folder.iterdir()) > before[1]  # computed, not taken from the record
    assert run(str(record.parent), "--url", f"{server.url}/v1/") == 0
    capsys.readouterr()
    # What is recorded of the replay itself, in the same folder, is not replayed in turn.
    wait_for_lines(folder, len(CALLS) + 2 * REPLAYED)
    assert run(str(folder), "--url", server.url, "--concurrency", "1") == 0
    assert f"{3 * REPLAYED} replayed: {3 * REPLAYED} equal" in capsys.readouterr().out


def test_a_server_that_does_not_take_the_key(record: Path, capsys: Capture) -> None:
    closed = Server({"api_keys": ["k"]}, [TINY])
    closed.start()
    try:
        assert run(str(record), "--url", closed.url, "--api-key", "wrong") == 2
    finally:
        closed.stop()
    said = capsys.readouterr()
    assert (said.out, "refuses the key. Give another with --api-key." in said.err) == ("", True)


def test_a_model_of_this_process(record: Path, capsys: Capture) -> None:
    assert run(str(record), "--model", LOADER, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["result"] for line in lines[:-1]] == ["equal"] * 4 + ["skipped"] * 2
    assert lines[-1]["summary"] == {"equal": 4, "differs": 0, "failed": 0, "skipped": 2}
    ((before, now),) = lines[-1]["fingerprints"]  # Its engine has other options.
    assert before != now


@pytest.mark.parametrize("number", range(REPLAYED))
def test_the_first_token_that_differs(
    server: Server, record: Path, tmp_path: Path, capsys: Capture, number: int
) -> None:
    choice, position = (1 if number else 0), 2
    was: list[int] = []

    def change(line: dict[str, Any]) -> None:
        ids = next(each["token_ids"] for each in line["choices"] if each["index"] == choice)
        was.append(ids[position])
        ids[position] = (ids[position] + 1) % 256

    file = changed(record, tmp_path, number, change)
    assert run(str(file), "--url", server.url, "--json") == 1
    found = json.loads(capsys.readouterr().out.splitlines()[number])
    assert (found["result"], found["choice"], found["position"]) == ("differs", choice, position)
    assert found["now"]["token_id"] == was[0]
    assert found["recorded"]["token_id"] == (was[0] + 1) % 256
    assert 0 < found["recorded_token_now"] < 1
    assert 0 < found["now"]["probability"] < 1
    if number == 0:  # greedy, and recorded with log-probabilities
        assert found["now"]["probability"] == pytest.approx(found["recorded"]["probability"], rel=1e-3)
    assert run(str(file), "--url", server.url) == 1
    out = capsys.readouterr().out
    place = f"calls-changed.jsonl:{number + 1}: answer {choice} differs at token {position}: token {(was[0] + 1) % 256}"
    assert place in out
    assert f"now token {was[0]} with probability 0." in out


def test_an_answer_that_ended_earlier(server: Server, record: Path, tmp_path: Path, capsys: Capture) -> None:
    file = changed(record, tmp_path, 0, lambda line: line["choices"][0]["token_ids"].pop())
    assert run(str(file), "--url", server.url) == 1
    assert "answer 0 differs at token 5: the end was recorded; now token" in capsys.readouterr().out


def test_another_prompt(server: Server, record: Path, tmp_path: Path, capsys: Capture) -> None:
    file = changed(record, tmp_path, 0, lambda line: line["prompts"][0]["token_ids"].insert(3, 9))
    assert run(str(file), "--url", server.url) == 1
    assert (
        "calls-changed.jsonl:1: the prompt differs at token 3: recorded token 9, now token" in capsys.readouterr().out
    )


def test_a_call_that_fails_now(server: Server, record: Path, capsys: Capture) -> None:
    assert run(str(record), "--url", server.url, "--ask", "none") == 1
    out = capsys.readouterr().out
    assert "calls-copy.jsonl:1: failed: " in out
    assert f"{REPLAYED} replayed: 0 equal, 0 different, {REPLAYED} failed." in out


@pytest.fixture
def steered(server: Server, record: Path, folder: Path, tmp_path: Path) -> Path:
    """A record of a call of the variant, of one with interventions, and of one that has no end."""
    for body in ({"model": "tiny+mute"}, {"model": "tiny", **MUTE, "capture": {"modules": ["model.norm"]}}):
        asked = {**body, "prompt": "Hello", "temperature": 0, "max_tokens": 4, "request_id": f"steered-{len(body)}"}
        answer = requests.post(server.url + TEXT, json=asked, headers={"x-troupe-resume": "false"}, timeout=30)
        answer.raise_for_status()
    begun = time.monotonic()
    (file,) = folder.glob("calls-*.jsonl")
    while len(lines := [line for line in file.read_text().splitlines() if '"cmpl-steered-' in line]) < 2:
        assert time.monotonic() - begun < 10
        time.sleep(0.01)
    copy = tmp_path / "calls-steered.jsonl"
    copy.write_text("".join(line + "\n" for line in lines[-2:]) + lines[-1][:200])
    return copy


def test_a_call_of_a_variant_is_that_of_the_variant(server: Server, steered: Path, capsys: Capture) -> None:
    assert [json.loads(line).get("variant") for line in steered.read_text().splitlines()[:2]] == ["tiny+mute", None]
    assert run(str(steered), "--url", server.url) == 0
    out = capsys.readouterr().out
    assert "2 replayed: 2 equal, 0 different, 0 failed.\n" in out
    assert "Not replayed: 1 cut short at the end of its file.\n" in out
    assert run(str(steered), "--url", server.url, "--ask", "tiny") == 0
    assert "1 of a variant, whose default fields the asked model does not have.\n" in capsys.readouterr().out


def test_no_probabilities_of_another_model_beside_a_steered_answer(
    server: Server, steered: Path, tmp_path: Path, capsys: Capture
) -> None:
    def change(line: dict[str, Any]) -> None:
        line["choices"][0]["token_ids"][0] += 1

    steered.write_text("".join(line + "\n" for line in steered.read_text().splitlines()[:2]))
    file = changed(steered, tmp_path, 1, change)
    assert run(str(file), "--url", server.url, "--json") == 1
    found = json.loads(capsys.readouterr().out.splitlines()[1])
    assert (found["result"], found["position"], found["recorded_token_now"]) == ("differs", 0, None)


def test_mistakes(record: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "other.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "text.jsonl").write_text("text\n")
    for arguments, said in (
        ([str(record)], "either --url or --model"),
        ([str(record), "--url", "http://a", "--model", "b"], "either --url or --model"),
        ([str(record), "--url", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1/ does not answer"),
        ([str(tmp_path), "--url", "http://127.0.0.1:9"], "has no record files"),
        ([str(tmp_path / "none.jsonl"), "--url", "http://127.0.0.1:9"], "none.jsonl cannot be read"),
        ([str(tmp_path / "other.jsonl"), "--url", "http://127.0.0.1:9"], "line 1: a recorded call has 'choices'"),
        ([str(tmp_path / "text.jsonl"), "--url", "http://127.0.0.1:9"], "line 1: it is not a recorded call"),
        ([str(record), "--model", str(tmp_path / "nothing")], "nothing"),
    ):
        assert run(*arguments) == 2
        assert said in capsys.readouterr().err
