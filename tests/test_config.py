"""The YAML's schema: what it accepts, and how it says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import AppArgs, parse_args, unknown_model
from deployments.errors import ConfigError
from deployments.launch import base_url, read_config

ROOT = Path(__file__).parent.parent


def model(**fields: Any) -> dict[str, Any]:
    return {"id": "a", "loader": "model_loaders.demo:load_model", **fields}


def test_the_shipped_configuration_is_valid() -> None:
    config, args = read_config(ROOT / "serve_config.yaml")
    assert base_url(config) == "http://127.0.0.1:8000"
    assert [entry.id for entry in args.models] == ["demo"]
    assert args.by_name()["gpt-3.5-turbo-0613"].engine.max_rows == 16


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"models": [model()], "max_models": 2}, "max_models: unknown key (did you mean 'max_models_per_replica'?)"),
        ({"models": [model(loadr="x")]}, "models[0].loadr: unknown key (did you mean 'loader'?)"),
        (
            {"models": [model(engine={"max_row": 3})]},
            "models[0].engine.max_row: unknown key (did you mean 'max_rows'?)",
        ),
        (
            {"models": [model(api={"tool_prser": 1})]},
            "models[0].api.tool_prser: unknown key (did you mean 'tool_parser'?",
        ),
        ({"models": [model()], "api": {"api_key": []}}, "api.api_key: unknown key (did you mean 'api_keys'?)"),
        ({"models": [{"id": "a"}]}, "models[0].loader: missing"),
        ({"models": []}, "models: "),
        ({}, "models: missing"),
        ({"models": [model(engine={"kind": "fast"})]}, "models[0].engine.kind: "),
        ({"models": [model(), model()]}, "'a' names both model 'a' and model 'a'"),
        ({"models": [model(), model(id="b", aliases=["a"])]}, "'a' names both model 'a' and model 'b'"),
        ({"models": [model(pinned=True), model(id="b")]}, "1 pinned models (a) leave no room"),
    ],
)
def test_faults_name_the_key_and_the_fix(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert said in str(caught.value)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args({"models": [model(loadr="x", engin={})], "maxx": 1})
    assert len(str(caught.value).splitlines()) == 4


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    args: AppArgs = parse_args({"models": [model(), model(id="org/b")]})
    assert "Configured: a, org/b." in str(unknown_model("c", args))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "while parsing"),
        ("just text", "'applications'"),
        (
            "applications: [{name: x, import_path: other:app}]",
            "no application has import_path deployments.app:build_app",
        ),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert said in str(caught.value)


def test_a_loader_that_is_not_there_is_found_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for loader in ("no_such_module:load", "no/such/file.py:load"):
        app = {"import_path": "deployments.app:build_app", "args": {"models": [model(loader=loader)]}}
        file.write_text(yaml.safe_dump({"applications": [app]}))
        with pytest.raises(ConfigError, match=r"no module named|does not exist"):
            read_config(file)
