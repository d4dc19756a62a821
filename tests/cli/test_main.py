"""The command `troupe`: what it says at once, and what its arguments mean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cli.main import SCRIPT, main
from deployments.cli.serve_file import check_config, read_config
from deployments.cli.serve_options import ServeOptions, flag, keys
from deployments.cli.serve_source import written_config
from deployments.config.app import AppArgs

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "ray", "transformers", "fastapi", "rich", "numpy")


def run(*arguments: str) -> int:
    """The exit status of the command, in this process."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def plain(checked: tuple[dict[str, Any], AppArgs]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checked configuration without the time at which it was read."""
    return checked[0], checked[1].model_dump()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a model's folder, a loader, and a configuration with two models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.py").write_text("import json\ndef load_model(:\n")
    (tmp_path / "mine.py").write_text("def load_model(path='.', device='cpu'): ...\n")
    (tmp_path / "notes.txt").write_text("notes")
    models = [{"id": name, "loader": "model_loaders.demo:load_model"} for name in ("a", "b")]
    application = {"name": "two", "import_path": "deployments.app:build_app", "args": {"models": models}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "torn.yaml").write_text("a: [\n  b: }\n")
    (tmp_path / "utf16.yaml").write_text("a: b\n", encoding="utf-16")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    return tmp_path


@pytest.mark.parametrize("arguments", [[], ["--help"], ["serve", "--help"], ["check", "--help"], ["serve", "--prt"]])
def test_what_is_said_at_once_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom deployments.cli.main import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        f"    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if "--prt" in arguments else 0)
    assert done.stderr.splitlines()[-1] == "[]"
    assert ("Usage: troupe" in done.stdout) == (done.returncode == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serv"], "No such command 'serv'. Did you mean 'serve'?"),
        (["doctor"], "No such command 'doctor'. Did you mean 'check'?"),
        (["serve", "--prt", "1"], "No such option: --prt (Possible options: --port)"),
        (["serve", "--port", "99999"], "Invalid value for '--port': Input should be less than or equal to 65535"),
        (["serve", "./my-modle"], "./my-modle: there is no 'my-modle' in {folder} (did you mean 'my-model'?)."),
        (["serve", "my-modle"], "my-modle: there is no 'my-modle' in {folder} (did you mean 'my-model'?). It is"),
        (["serve", "models/nope"], "models/nope: there is no 'models' in {folder}"),
        (["serve", "none.yaml"], "none.yaml: No such file or directory."),
        (["serve", "list.yaml"], "list.yaml: expected a mapping with the key 'applications'."),
        (["serve", "torn.yaml"], "torn.yaml: while parsing"),
        (["serve", "utf16.yaml"], "utf16.yaml: it is not a text in UTF-8; save it as UTF-8."),
        (["serve", "deep.yaml"], "deep.yaml: it is nested too deeply."),
        (["serve", "empty"], "{folder}/empty is not a checkpoint of transformers: it has no config.json. Write one"),
        (["check", "empty"], "{folder}/empty is not a checkpoint of transformers: it has no config.json. Write one"),
        (["serve", "."], "{folder} is not a checkpoint of transformers: it has no config.json. Did you mean {folder}/"),
        (["serve", "torn.py:load_model", "--check"], "torn.py:load_model: {folder}/torn.py, line 2: SyntaxError: "),
        (["serve", "mine.py", "--check"], "mine.py: loader {folder}/mine.py: name the function, such as {folder}/mi"),
        (["serve", "my-model", "--host", "", "--check"], "my-model: http_options.host: write an address, such as 127"),
        (["serve", "notes.txt"], "notes.txt is a file. Give a configuration (.yaml), a model's folder, org/name, or"),
        (["serve", "their.py:load_model"], "their.py:load_model: there is no 'their.py' in {folder}"),
        (["serve", "mine.py:load", "--check"], "mine.py:load: loader {folder}/mine.py:load: {folder}/mine.py has no"),
        (["serve", "mine.py:load_model", "--kwargs", "path"], "--kwargs 'path': write a mapping, such as"),
        (["serve", "mine.py:load_model", "--kwargs", "{a: 1}", "--check"], "mine.py:load_model: model 'mine', kwargs"),
        (["serve", "my-model", "--dtype", "x", "--kwargs", "{dtype: y}"], "--kwargs: another argument of the command"),
        (["serve", "two.yaml", "--dtype", "x"], "--dtype is for a model that the command line names. Set models"),
        (["serve", "my-model", "--gpus", "3", "--replicas", "2"], "--gpus 3: write 0, or a multiple or a divisor of"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"troupe: {message.format(folder=folder)}")
    assert (said.err.count("\n"), said.out) == (1, "")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["my-model", "--id", "m", "--alias", "n", "--alias", "o", "--dtype", "bfloat16", "--trust-remote-code"],
        ["my-model", "--gpus", "4", "--replicas", "2", "--port", "8123", "--max-batch-size", "4", "--deterministic"],
        ["mine.py:load_model", "--kwargs", "{path: my-model}", "--max-model-len", "64", "--reasoning-parser", "think"],
        ["two.yaml", "--host", "0.0.0.0", "--max-models", "2", "--replicas", "1"],
        ["model_loaders.demo:load_model", "--record-dir", "records"],
    ],
)
def test_the_printed_configuration_is_what_is_served(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []
    monkeypatch.setattr("deployments.cli.launch.serve", lambda written, **_: served.append(written) or 0)
    assert run("serve", *arguments, "--print-config") == 0
    (folder / "kept.yaml").write_text(capsys.readouterr().out)
    assert run("serve", *arguments) == run("serve", "kept.yaml") == 0
    typed, kept = served
    assert plain(check_config(typed)) == plain(check_config(kept))
    assert typed.folder.resolve() == kept.folder.resolve() == folder


def test_without_a_file_it_is_the_shipped_one(folder: Path) -> None:
    """And that one says nothing of processors, which are found out at start."""
    demo, shipped = check_config(written_config(ServeOptions())), read_config(ROOT / "serve_config.yaml")
    assert "deployments" not in shipped[0]["applications"][0]
    for config, args in (demo, shipped):
        config["applications"][0]["args"] = args.model_dump()  # with the defaults that only one of them writes down
    assert plain(demo) == plain(shipped)
    (folder / "serve_config.yaml").write_text((folder / "two.yaml").read_text())
    assert plain(check_config(written_config(ServeOptions()))) == plain(read_config(folder / "two.yaml"))


def test_an_option_wins_over_the_file_and_the_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr("deployments.cli.launch.serve", lambda written, **_: served.append(check_config(written)) or 0)
    monkeypatch.setenv("TROUPE_PORT", "8001")
    assert run("serve", "two.yaml") == run("serve", "two.yaml", "--port", "8002", "--max-models", "3") == 0
    (before, args), (after, changed) = served
    assert (before["http_options"]["port"], args.max_models_per_replica) == (8001, 1)
    assert (after["http_options"]["port"], changed.max_models_per_replica) == (8002, 3)


@pytest.mark.parametrize(
    ("gpus", "replicas", "count", "each"),
    [(0, None, 1, 0), (4, None, 4, 1), (4, 2, 2, 2), (1, 4, 4, 0.25), (1, 3, 3, 0.3333), (None, 2, 2, None)],
)
def test_gpus_are_shared_by_the_replicas(
    folder: Path, gpus: int | None, replicas: int | None, count: int, each: float | None
) -> None:
    written = written_config(ServeOptions(model="my-model", gpus=gpus, replicas=replicas))
    (app,) = written.config["applications"]
    options = {} if each is None else {"ray_actor_options": {"num_gpus": each}}
    assert app["deployments"] == [{"name": "ModelReplica", "num_replicas": count, **options}]
    assert app["args"]["models"][0]["kwargs"].get("device_map") == ("auto" if each and each > 1 else None)


def test_every_option_sets_the_key_that_it_names(folder: Path) -> None:
    values = {"port": 8123, "max_models": 2, "alias": ["n"], "trust_remote_code": True, "deterministic": True}
    values |= {"kwargs": "{extra: 1}", "max_batch_size": 3, "max_model_len": 9}
    for name, key in keys().items():
        value = values.get(name, "text")
        config = written_config(ServeOptions(model="my-model", **{name: value})).config
        section: Any = config if key.startswith("http") else config["applications"][0]["args"]
        for step in key.removeprefix("args.").split("."):
            section = section["models"][0] if step == "models[]" else section[step]
        assert section == ({"model_name": str(folder / "my-model"), "extra": 1} if name == "kwargs" else value), flag(
            name
        )


@pytest.mark.parametrize(
    ("arguments", "variables", "port"),
    [
        ([], {}, 8000),
        (["two.yaml", "--port", "8123"], {"HF_MODEL": "my-model"}, 8123),
        (["--hf-model", "my-model"], {}, 7088),
        (["--fast", "--torch-dtype=float16", "--hf-model=my-model"], {}, 7088),
        ([], {"HF_MODEL": "my-model"}, 7088),
        (["--port", "8123"], {"HF_MODEL": "my-model"}, 8123),
    ],
)
def test_scripts_serve_takes_the_flags_of_other_servers(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    variables: dict[str, str],
    port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a model that is named, and with their variables or a flag that only they have."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(SCRIPT, *arguments, "--print-config") == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["http_options"]["port"] == port
    assert ("logging_config" in config) == (arguments[:1] != ["two.yaml"] and port != 8000)


def test_a_process_without_standard_streams(folder: Path) -> None:
    shell = f"{sys.executable} -m deployments.cli.main serve my-model --print-config <&- >&- 2>&-"
    assert (
        subprocess.run(["bash", "-c", shell], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    )


def test_the_help_of_the_two(capsys: pytest.CaptureFixture[str]) -> None:
    for command, option in ((SCRIPT, "--print-config"), ("serve-compat", "--pagedattention-block-size")):
        assert run(command, "--help") == 0
        assert option in capsys.readouterr().out
