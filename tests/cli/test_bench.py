"""`troupe bench`, against real servers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deployments import local
from deployments.cli import main as command
from deployments.cli.bench import targets
from deployments.cli.bench.report import figures
from deployments.cli.bench.workloads import WORKLOADS, messages


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The API of a simulated model, in this process."""
    quick = {"load_seconds": 0, "slowdown": 0.1}
    with local.start("model_loaders.examples.simulated:load_model", id="demo", kwargs=quick) as server:
        yield f"{server.url}/v1"


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        command.main(["bench", *arguments])
    return int(ended.value.code or 0)


def test_servers_are_measured_in_turns(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures_file, drawing = tmp_path / "bench.json", tmp_path / "bench.svg"
    asked = ["--workload", "churn", "--concurrency", "1", "--concurrency", "3"]
    files = [*("--json", str(figures_file)), *("--svg", str(drawing))]
    status = bench("--url", f"a={url}", "--url", f"b={url}", *asked, "--rounds", "2", "--conversations", "3", *files)
    printed = capsys.readouterr().out
    assert status == 0
    found = json.loads(figures_file.read_text())
    assert [(each["concurrency"], each["target"]) for each in found["results"]] == [
        (at_once, name) for at_once in (1, 3) for name in ("a", "b")
    ]
    for each in found["results"]:
        assert len(each["rounds"]) == 2
        assert each["errors"] == 0
        assert 0 < each["first_p50_ms"] <= each["first_p99_ms"]
        assert each["tokens_per_s"] > 0
        assert each["target"] == "b" or each["times"] == 1
        row = f"| {each['workload']} | {each['concurrency']} | {each['target']} | {each['tokens_per_s']:.1f}"
        assert row in printed
    assert {"processor", "cores", "copy_gb_s", "load", "versions"} <= set(found["conditions"])
    panels = ElementTree.parse(drawing).getroot()
    texts = [each.text for each in panels.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a", "b", "churn: tokens/s", "churn: first token, median, ms"} <= set(texts)
    assert len(list(panels.iter("{http://www.w3.org/2000/svg}path"))) == 3 * (1 + 2)


def test_conversations_send_what_was_said_before_and_long_prompts_come_between(url: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    asked = ["--workload", "agent6", "--workload", "mixed", "--concurrency", "2", "--conversations", "2"]
    assert bench("--url", url, *asked, "--rounds", "1", "--json", str(file)) == 0
    agents, mixed = json.loads(file.read_text())["results"]
    assert agents["errors"] == mixed["errors"] == 0
    assert agents["prompt_tokens"] > 200 + 2 * 60, "a turn has all before it"
    assert mixed["long_prompts"] > 0


def test_a_peer_is_started_measured_and_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = (sys.executable, "-m", "deployments.local", "--loader", "model_loaders.demo:load_model")
    monkeypatch.setitem(targets.PEERS, "troupe", (*serve, "--port", "{port}", "--id", "{id}"))
    file = tmp_path / "bench.json"
    asked = ["--workload", "churn", "--concurrency", "1", "--rounds", "1", "--json", str(file)]
    assert bench("--peer", "troupe --host 127.0.0.1", "--model", "./weights", *asked) == 0
    found = json.loads(file.read_text())
    assert found["targets"][0]["command"].endswith("--id troupe --host 127.0.0.1")
    assert found["results"][0]["tokens_per_s"] > 0
    url = found["targets"][0]["url"]
    capsys.readouterr()
    assert bench("--url", f"gone={url}", *asked) == 1
    assert "requests failed; the first: gone: ConnectionRefusedError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--url of a running server, or --peer"),
        (("--url", "127.0.0.1:8000"), "--url '127.0.0.1:8000' should be a URL such as"),
        (("--url", "http://a/v1", "--workload", "shrot"), "--workload 'shrot': there are short, words300"),
        (("--url", "http://a/v1", "--url", "http://a/v1"), "Two servers have one name"),
        (("--peer", "transformer"), "--peer 'transformer': there are troupe, transformers"),
        (("--peer", "llama.cpp"), "--peer llama.cpp needs --gguf"),
        (("--peer", "none"), "--peer none: no-such-server is not installed"),
        (("--peer", "dies"), "--peer dies does not answer: no such weights"),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.PEERS, "none", ("no-such-server",))
    monkeypatch.setitem(targets.PEERS, "dies", (sys.executable, "-c", "import sys; sys.exit('no such weights')"))
    assert bench(*arguments) == 2
    assert said in capsys.readouterr().err


def test_figures_of_a_run() -> None:
    quick = {
        "first": 0.1,
        "whole": 0.4,
        "gaps": [0.1, 0.2],
        "tokens": 3,
        "prompt_tokens": 5,
        "long": False,
        "error": "",
    }
    slow = {**quick, "first": 0.3, "gaps": [0.9], "tokens": 2}
    long = {**quick, "first": 9.0, "long": True}
    failed = {**quick, "first": 0.0, "tokens": 0, "error": "refused"}
    found = figures({"seconds": 2.0, "requests": [quick, slow, long, failed]})
    assert found["tokens_per_s"] == 2.5
    assert found["requests_per_s"] == 1.0
    assert (found["first_p50_ms"], found["first_p99_ms"]) == (pytest.approx(300), pytest.approx(300))
    assert (found["gap_p50_ms"], found["gap_p99_ms"]) == (pytest.approx(200), pytest.approx(900))
    assert found["errors"] == 1


def test_other_seeds_give_other_prompts_from_the_first_word_on() -> None:
    for workload in WORKLOADS.values():
        first, second = (list(messages(workload, seed)) for seed in (1, 2))
        assert len(first) == workload.turns
        assert len(first[0].split()) == workload.words
        assert first != second
        assert first == list(messages(workload, 1))
