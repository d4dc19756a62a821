"""`troupe agentbench`, with a small stand-in for AgentBench; tests/clients/test_agentbench.py has the real one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deployments.cli.agentbench import tasks
from deployments.cli.main import main
from tests.openai.conftest import MODELS, Server

MINI = Path(__file__).parent / "mini_agentbench"
MODEL = "org/scripted"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a server with a scripted model."""
    server = Server({}, MODELS)
    server.start()
    yield server.url
    server.stop()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI, tmp_path / "AgentBench"))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["agentbench", *map(str, arguments)])
    return int(end.value.code or 0)


def of(repo: Path, url: str, *more: object) -> list[object]:
    return ["--repo", repo, "--url", url, "--model", MODEL, "--tasks", "avalon", "--output", repo.parent / "out", *more]


def test_a_run_writes_what_agentbench_reads_and_prints_the_scores(url: str, repo: Path, capsys: Capture) -> None:
    assert run(*of(repo, f"{url}/v1", "--workers", 4, "--fields", "{max_tokens: 5}")) == 0
    printed, said = capsys.readouterr()
    result = repo.parent / "out" / "org_scripted" / "avalon-dev-single" / "overall.json"
    assert printed.splitlines() == [
        "avalon-dev-single: 2 samples (2 completed)",
        f"  {'won':30} 0.5000",
        f"  {result}",
    ]
    assert "AgentBench reads the errors of the server as they are meant" in said
    assert "Starting 2 task workers" in said, "a worker for each sample; the others would wait"
    files = {file.name: yaml.safe_load(file.read_text()) for file in (repo.parent / "out" / "config").iterdir()}
    agent = files["assignment.yaml"]["definition"]["agent"]["org_scripted"]
    assert agent["module"] == "src.client.agents.HTTPAgent"
    assert agent["parameters"]["prompter"]["args"] == {"agent_role": "assistant"}
    assert agent["parameters"]["body"] == {"model": MODEL, "temperature": 0, "max_tokens": 5}
    assert agent["parameters"]["url"] == f"{url}/v1/chat/completions"
    assert files["agents.yaml"]["gpt-3.5-turbo-0613"] == agent, "the judge is the model that is measured"
    assert files["assignment.yaml"]["concurrency"] == {
        "task": {"avalon-dev-single": 4},
        "agent": {"org_scripted": 4},
    }
    assert files["tasks.yaml"]["import"] == [str(repo / "configs/tasks/avalon.yaml")]
    assert files["tasks.yaml"]["avalon-dev-single"]["parameters"] == {"name": "avalon-dev-single", "concurrency": 1}


def test_failed_samples_are_run_again_and_then_named(url: str, repo: Path, capsys: Capture) -> None:
    samples = repo / "data/avalon/dev.json"
    samples.write_text('["Repeat exactly: abc", "fail"]')
    assert run(*of(repo, url, "--workers", 1, "--retries", 1)) == 1
    printed, said = capsys.readouterr()
    assert printed.splitlines() == [
        "avalon-dev-single: no score, since 1 of 2 samples have failed",
        "  2 times: AGENT_FAILED: Failed.",
    ]
    assert "Running failed samples again: avalon-dev-single 1 of 2; 1 failures" in said
    samples.write_text('["Repeat exactly: abc", "Repeat exactly: def"]')
    assert run(*of(repo, url, "--workers", 1)) == 0, "the same folder: only the failed sample is left"
    runs = (repo.parent / "out/org_scripted/avalon-dev-single/runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in runs] == [0, 1]


def test_errors_that_agentbench_would_misread_are_named(url: str, repo: Path, capsys: Capture) -> None:
    classifier = repo / "src/client/agents/http_agent.py"
    classifier.write_text("def check_context_limit(text):\n    return 'no-such-model' in text\n")
    assert run(*of(repo, url, "--workers", 1)) == 1
    said = capsys.readouterr().err
    assert "takes the error for an unknown model for an overflow of the context, status 404: {" in said
    assert "does not see an overflow of the context in the error for a request that is longer" in said


def test_a_worker_that_ends_is_named(url: str, repo: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_WORKER", "dies")
    assert run(*of(repo, url)) == 2
    said = capsys.readouterr().err
    assert "troupe: AgentBench's avalon-dev-single-" in said
    assert said.endswith("no world for this worker\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "avalon,os"], "--tasks os: this task needs docker, which troupe agentbench does not start."),
        (["--tasks", "chess"], "--tasks 'chess': there are avalon, ltp, dbbench, avalon-dev-single"),
        (["--tasks", ","], "--tasks names no task"),
        (["--repo", "no-such"], "there is no such folder. Clone https://github.com/THUDM/AgentBench"),
        (["--tasks", "ltp"], "configs/tasks/ltp.yaml is missing, so this is not AgentBench v0.2"),
        (["--python", "no-such"], "--python no-such: there is no such program"),
        (["--fields", "[1]"], "--fields '[1]' should be a mapping"),
        (["--config", "my.yaml"], "Give either --url or --config"),
        ([], "http://127.0.0.1:1 does not answer: ConnectError"),
    ],
)
def test_mistakes_are_named(repo: Path, capsys: Capture, options: list[str], said: str) -> None:
    assert run(*of(repo, "http://127.0.0.1:1"), *options) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_is_not_there(url: str, repo: Path, capsys: Capture) -> None:
    assert run(*of(repo, url), "--model", "other") == 2
    assert "--model 'other': there are org/scripted, merging" in capsys.readouterr().err


def test_packages_that_the_python_lacks(repo: Path, capsys: Capture) -> None:
    (repo / "tqdm.py").write_text("raise ImportError('not installed')")
    assert run(*of(repo, "http://127.0.0.1:1", "--python", sys.executable)) == 2
    said = capsys.readouterr().err
    assert "lacks what AgentBench needs: tqdm. Run:" in said
    assert "agentbench-env/bin/pip install 'pydantic<2' 'requests'" in said
    (repo / "tqdm.py").unlink()
    (repo / "src/assigner.py").write_text("raise TypeError('root_validator')")
    assert run(*of(repo, "http://127.0.0.1:1")) == 2
    assert "lacks what AgentBench needs: pydantic<2 (it has 2." in capsys.readouterr().err


def test_dbbench_needs_a_mariadb(repo: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("configs/tasks/dbbench.yaml", "data/dbbench/dev.jsonl"):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("{}")
    # Debian's mariadb-server-core alone lacks the last one.
    for there, lacking in ((), "mariadbd"), (("mariadbd", "mariadb-install-db"), "my_print_defaults"):
        monkeypatch.setattr(tasks.shutil, "which", lambda name, *_, there=there, **__: name if name in there else None)
        assert run(*of(repo, "http://127.0.0.1:1"), "--tasks", "avalon,dbbench") == 2
        said = capsys.readouterr().err
        assert f"dbbench needs a MariaDB of this machine, and {lacking} is not installed" in said
