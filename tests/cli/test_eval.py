"""`troupe eval` over models of a server: the bundled benchmark; tests/clients/test_eval.py has lm_eval."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from deployments.cli.endpoint.server import Endpoint
from deployments.cli.main import main
from deployments.cli.sweep.lm_eval import scores
from deployments.cli.sweep.results import wilson
from deployments.cli.sweep.worlds import play
from tests.conftest import DEMO
from tests.faults import paced
from tests.openai.conftest import Server

MUTE = {"demo+mute": {"stop": ["A"]}}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, and a variant whose answers end before their first word; both record."""
    demo = {**DEMO, "engine": {"max_batch_size": 16, "threads": 1}, "variants": MUTE}
    running = Server({"record_dir": str(tmp_path_factory.mktemp("record"))}, [demo])
    running.start()
    yield running
    running.stop()


def evaluate(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["eval", *map(str, arguments)])
    return int(end.value.code or 0)


def test_a_sweep_over_variants_is_written_and_goes_on(server: Server, tmp_path: Path, capsys: Capture) -> None:
    asked = ["--url", server.url, "--episodes", 4, "--output", tmp_path / "out"]
    assert evaluate("--models", "demo", *asked) == 0
    assert "demo: measuring" in capsys.readouterr().err
    assert evaluate("--models", "demo*", *asked) == 0
    printed, said = capsys.readouterr()
    assert "demo: has a result" in said
    assert "demo+mute: measuring" in said
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["settings"] == {"task": "agent:worlds", "episodes": 4, "seed": 0}
    models: dict[str, Any] = {each["model"]: each for each in found["results"]}
    assert list(models) == ["demo", "demo+mute"], "the alias is not measured"
    assert models["demo"]["fingerprint"]["weights"], "the parts of the fingerprint"
    values = {name: {score["metric"]: score for score in each["scores"]} for name, each in models.items()}
    assert values["demo"]["score"]["value"] >= 0.75
    assert values["demo"]["score"]["samples"] == 4
    assert values["demo+mute"]["score"]["value"] == 0
    assert values["demo+mute"]["score"]["low"] == 0 < values["demo+mute"]["score"]["high"] < 0.5
    assert values["demo"]["valid actions"]["value"] > values["demo+mute"]["valid actions"]["value"] == 0
    mark = models["demo"]["fingerprint"]["fingerprint"]
    (row,) = [line for line in printed.splitlines() if line.startswith("demo ") and " score " in line]
    assert row.endswith(mark)
    assert (
        f"| demo | agent:worlds | score | {values['demo']['score']['value']:.4f} |"
        in (tmp_path / "out" / "results.md").read_text()
    )
    drawing = ElementTree.parse(tmp_path / "out" / "results.svg").getroot()
    texts = [each.text for each in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"agent:worlds score", "agent:worlds valid actions", "demo", "demo+mute"} <= set(texts)
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == 4


def test_a_model_that_fails_does_not_end_the_sweep(server: Server, tmp_path: Path, capsys: Capture) -> None:
    broken = {"id": "broken", "loader": "tests.openai.scripted:no_such_function"}
    both = Server({}, [broken, {"id": "scripted", "loader": "tests.openai.scripted:load_model"}])
    both.start()
    try:
        assert evaluate("--models", "*", "--url", both.url, "--episodes", 2, "--output", tmp_path) == 1
    finally:
        both.stop()
    printed, said = capsys.readouterr()
    assert "broken: failed: broken: status " in said
    assert [line.split()[0] for line in printed.splitlines()] == ["model", "broken", "scripted", "scripted"]
    (broken_result, _) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert "no_such_function" in broken_result["error"]


def test_an_interrupted_run_plays_no_episode_to_its_end(tmp_path: Path) -> None:
    def interrupt(ended: int) -> None:
        raise KeyboardInterrupt

    running = Server({"record_dir": str(tmp_path)}, [paced.model("slow", pace=0.001)])
    running.start()
    try:
        play(Endpoint(running.url), "slow", episodes=1, workers=1, seed=0)
        with pytest.raises(KeyboardInterrupt):
            play(Endpoint(running.url), "slow", episodes=3, workers=1, seed=1, show=interrupt)
    finally:
        running.stop()
    lines = [json.loads(line) for file in tmp_path.glob("calls-*.jsonl") for line in file.read_text().splitlines()]
    # A call has more messages than the call before it; `Hi` asks whether the server has a record.
    sizes = [len(line["request"]["messages"]) for line in lines if line["request"]["messages"][-1]["content"] != "Hi"]
    starts = [number for number, size in enumerate(sizes) if number == 0 or size < sizes[number - 1]]
    assert starts[:3] == [0, 20, 40][: len(starts)], "a world has 20 steps"
    assert 40 <= len(sizes) < 50


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--models", "nope"], "--models 'nope' matches none of"),
        (["--models", "nope*"], "demo, demo+mute"),
        (["--models", "demo", "--task", "gsm8k"], "--task 'gsm8k': there are agent:worlds and lm_eval:TASK"),
        (["--models", "demo", "--task", "lm_eval:gsm8k", "--python", "no-such"], "--python"),
        (["--models", "demo", "--episodes", "3"], "has the results of another sweep (episodes differ)"),
    ],
)
def test_mistakes_are_named(server: Server, tmp_path: Path, capsys: Capture, options: list[str], said: str) -> None:
    settings = {"task": "agent:worlds", "episodes": 100, "seed": 0}
    (tmp_path / "results.json").write_text(json.dumps({"settings": settings, "results": []}))
    if "lm_eval:gsm8k" in options:
        (tmp_path / "results.json").unlink()
    assert evaluate("--url", server.url, "--output", tmp_path, *options) == 2
    assert said in capsys.readouterr().err


def test_intervals() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10)[0] == 0
    document = {
        "results": {
            "sums": {
                "alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 0.25,
                "exact_match_stderr,strict": "N/A",
            }
        },
        "n-samples": {"sums": {"original": 90, "effective": 40}},
    }  # fmt: skip
    first, second = scores(document)
    assert (first.metric, first.low, first.high, first.samples) == (
        "acc",
        pytest.approx(0.304, abs=1e-4),
        pytest.approx(0.696, abs=1e-4),
        40,
    )
    assert (second.metric, second.value, second.low) == ("exact_match, strict", 0.25, None)
