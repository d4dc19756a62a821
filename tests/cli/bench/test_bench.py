"""`troupe bench`, against real servers."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.request import Request, urlopen
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments import local
from deployments.cli import main as command
from deployments.cli.bench import peers
from deployments.cli.bench.flame import drawn
from deployments.cli.bench.forward import Scorer
from deployments.cli.bench.gate import slower
from deployments.cli.bench.peers import Peer
from deployments.cli.bench.profile import phases
from deployments.cli.bench.report import FIGURES, figures
from deployments.cli.bench.workloads import WORKLOADS, messages, picture
from model_loaders import demo

SCRIPTS = Path(__file__).parents[3] / "scripts"


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
        assert len(each["times"]) == 2
        assert each["target"] == "b" or each["times"] == [1, 1]
        row = f"| {each['workload']} | {each['concurrency']} | {each['target']} | {each['tokens_per_s']:.1f}"
        assert row in printed
    assert {"processor", "cores", "copy_gb_s", "load", "versions"} <= set(found["conditions"])
    panels = ElementTree.parse(drawing).getroot()
    texts = [each.text for each in panels.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a", "b", "churn: tokens/s", "churn: first token, median, ms"} <= set(texts)
    bars = [each for each in panels.iter("{http://www.w3.org/2000/svg}path") if each.get("class") == "bar"]
    assert len(bars) == 3 * 2 * 2, "panels, numbers at a time, servers"
    again = tmp_path / "again.svg"
    assert bench("--from", str(figures_file), "--svg", str(again)) == 0
    assert capsys.readouterr().out == printed
    assert again.read_text() == drawing.read_text()


def test_an_interrupted_bench_keeps_what_was_measured(url: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    asked = ["--url", url, "--workload", "short", "--concurrency", "1", "--concurrency", "2", "--rounds", "3"]
    command = [sys.executable, "-m", "deployments.cli.main", "bench", *asked, "--json", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "2 at a time" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "What was measured before is kept." in said
    assert [each["concurrency"] for each in json.loads(file.read_text())["results"]] == [1]
    assert "| short | 1 |" in printed


def test_conversations_send_what_was_said_before_and_long_prompts_come_between(url: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    asked = ["--workload", "agent6", "--workload", "mixed", "--concurrency", "2", "--conversations", "2"]
    assert bench("--url", url, *asked, "--rounds", "1", "--json", str(file)) == 0
    agents, mixed = json.loads(file.read_text())["results"]
    assert agents["errors"] == mixed["errors"] == 0
    assert agents["prompt_tokens"] > 200 + 2 * 60, "a turn has all before it"
    assert mixed["long_prompts"] > 0


class Leaving(BaseHTTPRequestHandler):
    """Answers each request with one token and closes the connection, after it has promised to keep it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        chunk = {"choices": [{"delta": {"content": "a"}}], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
        body = f"data: {json.dumps(chunk)}\n\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Keep-Alive", "timeout=5")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


def test_a_server_that_closes_a_connection_it_promised_to_keep_is_asked_on_another(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    with ThreadingHTTPServer(("127.0.0.1", 0), Leaving) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        asked = ["--workload", "agent6", "--concurrency", "1", "--conversations", "1", "--rounds", "1"]
        assert bench("--url", url, "--model", "m", *asked, "--json", str(file)) == 0
        server.shutdown()
    (agents,) = json.loads(file.read_text())["results"]
    assert agents["errors"] == 0


def test_a_peer_is_started_measured_and_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = ("-m", "deployments.local", "--loader", "model_loaders.demo:load_model", "--port", "{port}", "--id", "{id}")
    monkeypatch.setitem(peers.PEERS, "troupe", Peer(program="no-such-server", command=serve))
    file = tmp_path / "bench.json"
    asked = ["--workload", "churn", "--concurrency", "1", "--rounds", "1", "--json", str(file)]
    assert bench("--peer", f"ours=troupe@{sys.executable} --host 127.0.0.1", "--model", "./weights", *asked) == 0
    found = json.loads(file.read_text())
    assert found["targets"][0]["command"].endswith("--id ours --host 127.0.0.1")
    assert found["targets"][0]["idle_cores"] < 1
    assert found["results"][0]["tokens_per_s"] > 0
    assert found["results"][0]["processor_ms"] > 0
    url = found["targets"][0]["url"]
    capsys.readouterr()
    assert bench("--url", f"gone={url}", *asked) == 1
    assert "gone does not answer churn: ConnectionRefusedError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--url of a running server, or --peer"),
        (("--url", "127.0.0.1:8000"), "--url '127.0.0.1:8000' should be a URL such as"),
        (("--url", "http://a/v1", "--workload", "shrot"), "--workload 'shrot': there are short, words200"),
        (("--url", "http://a/v1", "--url", "http://a/v1"), "Two servers have one name"),
        (("--peer", "transformer"), "--peer 'transformer': there are troupe, transformers"),
        (("--peer", "llama.cpp"), "--peer llama.cpp needs --gguf"),
        (("--peer", "none"), "--peer none: no-such-server is not installed"),
        (("--peer", f"none@{sys.executable}", "--peer", "none"), "Two servers have one name"),
        (("--peer", "sglang"), "does not have the module sglang. Name a Python that has it: sglang@PATH"),
        (("--peer", "dies"), "--peer dies does not answer: no such weights"),
        (("--peer", "dies", "--model", "a", "--model", "b"), "A peer serves one --model"),
        (("--url", "http://a/v1", "--profile", "here"), "--profile needs a server that the bench starts"),
        (("--from", "no-such-file.json"), "no-such-file.json cannot be read"),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = ("-c", "import sys; sys.exit('no such weights')")
    monkeypatch.setitem(peers.PEERS, "none", Peer(program="no-such-server", command=()))
    monkeypatch.setitem(peers.PEERS, "dies", Peer(program=sys.executable, command=dies))
    assert bench(*arguments) == 2
    assert said in capsys.readouterr().err


def test_texts_are_scored_and_pictures_sent(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo model scores texts and does not see."""
    file = tmp_path / "bench.json"
    with local.start("model_loaders.demo:load_model", id="demo") as server:
        asked = ["--workload", "score", "--workload", "image", "--concurrency", "2", "--rounds", "1"]
        first = ["--url", f"demo={server.url}/v1"]
        status = bench(*first, "--url", f"simulated={url}", *asked, "--conversations", "2", "--json", str(file))
    assert status == 1
    scored, refused, *_ = json.loads(file.read_text())["results"]
    assert scored["errors"] == 0
    assert scored["tokens_per_s"] > 0
    assert scored["prompt_tokens"] >= 16 * 100
    assert refused["refused"]
    said = capsys.readouterr()
    assert "| score | 2 | simulated | – |" in said.out
    assert "simulated does not answer score: " in said.err
    assert "demo does not answer image: ValueError: status 400" in said.err


def test_a_bare_forward_scores_what_the_server_scores() -> None:
    """What `forward` measures is the same work: the same log-probabilities come."""
    weights = str(Path(demo.__file__).parent / "weights")
    texts = ["a river and a stone", "winter"]
    found = Scorer(weights).score(texts)
    with local.start("model_loaders.demo:load_model", id="demo") as server:
        body = {"model": "demo", "prompt": texts, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        asked = Request(f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(asked) as answer:
            theirs = json.load(answer)
    assert found["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]
    for ours, other in zip(found["choices"], theirs["choices"], strict=True):
        numbers = ours["logprobs"]["token_logprobs"]
        # The weights are bfloat16 here, and float32 in the server.
        assert numbers[1:] == pytest.approx(other["logprobs"]["token_logprobs"][1 : len(numbers)], abs=0.5)


def test_the_model_of_a_bench_never_ends_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", ["bench_model", str(tmp_path / "tiny"), "--size", "tiny"])
    runpy.run_path(str(SCRIPTS / "bench_model"), run_name="__main__")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype="float32")
    text = next(messages(WORKLOADS["short"], 1))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
    assert len(ids) == WORKLOADS["short"].words + 3, "a word is a token"
    assert tokenizer.decode(ids) == f"<|user|>{text}<|end|><|assistant|>"
    logits = model(torch.tensor([ids])).logits[0]
    assert (logits[:, model.config.eos_token_id] < logits.max(-1).values).all()


def test_conversations_take_turns_through_several_models(url: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    asked = ["--workload", "churn", "--concurrency", "1", "--rounds", "1", "--conversations", "4", "--json", str(file)]
    assert bench("--url", url, "--model", "demo", "--model", "nope", *asked) == 1
    assert json.loads(file.read_text())["results"][0]["errors"] == 2


def result(times: list[float], target: str = "b", **other: object) -> dict[str, object]:
    return {"workload": "short", "concurrency": 1, "target": target, "times": times, **other}


def test_a_gate_lets_noise_through() -> None:
    before = [
        result([1.0, 1.0], "a"),
        result([1.9, 2.0, 2.1]),
        result([1.0, 3.0], "c"),
        result([2.0], "d", refused=True),
    ]
    assert slower(before, before, 0.0) == ([], 2)
    assert slower([result([1.78, 1.85])], before, 0.0) == ([], 1)
    assert slower([result([1.78, 1.85])], before, 0.2) == ([], 1)
    assert slower([result([1.2], "c")], before, 0.0) == ([], 1), "the baseline itself differed that much"
    lines, compared = slower([result([1.7, 1.7])], before, 0.05)
    assert compared == 1
    assert lines == ["short, 1 at a time, against b: 1.70 times, and it was 2.00 (noise 0.20)"]


def test_the_gate_is_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures_of = {**dict.fromkeys(FIGURES, 1.0), "spread": 0.0, "errors": 0.0}
    rows = [{**result([1.0], "a"), **figures_of}, {**result([2.0]), **figures_of}]
    file, other = tmp_path / "now.json", tmp_path / "before.json"
    file.write_text(json.dumps({"results": rows}))
    assert bench("--from", str(file), "--gate", str(file)) == 0
    other.write_text(json.dumps({"results": [{**rows[1], "times": [3.0]}]}))
    assert bench("--from", str(file), "--gate", str(other)) == 1
    assert "against b: 2.00 times, and it was 3.00" in capsys.readouterr().out


def test_a_profile_says_where_time_goes() -> None:
    engine = ("run (deployments/engine/base/threaded.py:9)", "step (deployments/engine/batching/step_loop.py:5)")
    stacks = [
        {
            (*engine, "forward (torch/nn/module.py:1)"): 0.3,
            (*engine, "one (deployments/engine/sampling/sample.py:2)"): 0.1,
        },
        {("run (uvicorn/server.py:1)",): 0.1, ("main (elsewhere.py:1)",): 0.01},
    ]
    found = phases(stacks)
    assert found == {"choose tokens": 0.1, "steps": 0.3, "transport": 0.1, "other": 0.01}
    graph = ElementTree.fromstring(drawn(stacks[0], "engine"))
    titles = [each.text for each in graph.iter("{http://www.w3.org/2000/svg}title")]
    assert "one (deployments/engine/sampling/sample.py:2), 25.0 %" in titles


def test_a_picture_is_a_png() -> None:
    image = Image.open(BytesIO(b64decode(picture(32, 1).partition(",")[2])))
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert picture(32, 1) == picture(32, 1) != picture(32, 2)


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
