"""YAML in which a key is there twice, or a date is none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from deployments import local
from deployments.cli import main as command
from deployments.cli.serve_file import read_config
from deployments.config.yaml_text import read_yaml
from deployments.core.errors import ConfigError

CONFIG = """applications:
- import_path: deployments.app:build_app
  args:
    models:
    - id: demo
      loader: model_loaders.demo:load_model
      engine:
        max_batch_size: 4
        kind: auto
        max_batch_size: 8
"""


def test_a_key_that_is_there_twice_is_an_error_with_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "serve_config.yaml"
    file.write_text(CONFIG)
    with pytest.raises(ConfigError, match=r"serve_config\.yaml: the key 'max_batch_size' is at lines 8 and 10"):
        read_config(file)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3", "'a' is at lines 1 and 3"),
        ("a: 1\n'a': 3", "'a' is at lines 1 and 2"),
        ("{a: 1, a: 1}", "'a' is at line 1, twice"),
        ("x: [{port: 1,\n port: 2}]", "'port' is at lines 1 and 2"),
        ("1: a\n0x1: b", "'0x1' is at lines 1 and 2"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n  b: 1\n  b: 2", "'b' is at lines 4 and 5"),
    ],
)
def test_wherever_it_is(text: str, told: str) -> None:
    with pytest.raises(yaml.YAMLError, match=told):
        read_yaml(text)


def test_a_date_that_does_not_exist_is_an_error_with_its_line() -> None:
    with pytest.raises(yaml.YAMLError, match=r"line 2: '2026-13-45' is not a date \(month must be in 1\.\.12\)"):
        read_yaml("a: 2026-12-31\nid: 2026-13-45")


@pytest.mark.parametrize(
    "text", ["a: {a: 1}\nb: {a: 1}", "x: &x {a: 1}\ny: {<<: *x, a: 2}\nz: {<<: *x}", "1: a\n'1': b"]
)
def test_what_is_not_a_repetition(text: str) -> None:
    assert read_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("main", "loader"), [(local.main, "--loader"), (command.main, "serve")], ids=["deployments.local", "troupe"]
)
def test_the_arguments_of_a_command(
    main: Callable[[], None], loader: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [loader, "model_loaders.demo:load_model", "--kwargs", "{dtype: a, dtype: b}"]
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code
    said = f"{capsys.readouterr().err} {ended.value.code}"
    assert "the key 'dtype' is at line 1, twice" in " ".join(said.split())
