"""Names of models that are paths which lead nowhere: refused before the Hub is asked, with what is there instead."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import yaml

from deployments.args import read_args
from deployments.cli.serve_file import read_config
from deployments.config.app import IMPORT_PATH
from deployments.core.errors import ConfigError, ModelLoadFailed
from deployments.host.host import ModelHost
from deployments.registry.files import model_files
from model_loaders import auto
from model_loaders.local_folder import check_folders, found
from model_loaders.resolve import load_model_info


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, which is home and working directory, and where the Hub must not be asked."""
    (tmp_path / "checkpoints" / "run-12").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTYPED = [
    ("./checkpionts/run-12", "there is no 'checkpionts' in {home} (did you mean 'checkpoints'?)"),
    ("checkpoints/run_12/", "there is no 'run_12' in {home}/checkpoints (did you mean 'run-12'?)"),
    ("../{name}/checkpoints/run-21", "(did you mean 'run-12'?)"),
    ("~/checkpoint", "there is no 'checkpoint' in {home} (did you mean 'checkpoints'?)"),
    (".\\checkpoints\\run12", "there is no 'run12' in {home}/checkpoints (did you mean 'run-12'?)"),
    ("..\\x", "there is no 'x' in "),
    ("{home}/data/x", "there is no 'data' in {home} (it has checkpoints, empty)"),
    ("./empty/x", "there is no 'x' in {home}/empty (it is empty)"),
    ("a/b/c", "there is no 'a' in {home}"),
    (
        "checkpoints/run-21",
        "there is no 'run-21' in {home}/checkpoints (did you mean 'run-12'?). If it is",
    ),
    ("empty/x", "there is no 'x' in {home}/empty (it is empty)"),
]


@pytest.mark.parametrize(("given", "said"), MISTYPED)
@pytest.mark.parametrize("loader", ["model_loaders.auto:load_model", "model_loaders.demo:load_model"])
def test_a_mistyped_folder_is_an_error_at_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str, loader: str
) -> None:
    monkeypatch.setattr(auto, "AutoConfig", None)  # Nobody asks for it.
    name, key = given.format(home=home, name=home.name), "model_name" if "auto" in loader else "model"
    with pytest.raises(ModelLoadFailed) as caught:
        load_model_info(loader, {key: name}, "cpu")
    assert f"{key}: {name}: " in caught.value.message
    assert said.format(home=home) in caught.value.message


@pytest.mark.parametrize(("given", "said"), MISTYPED)
def test_the_check_of_a_configuration_finds_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str
) -> None:
    monkeypatch.chdir("/")
    name = given.format(home=home, name=home.name)
    model = {"id": "mine", "loader": "model_loaders.auto:load_model", "kwargs": {"model_name": name}}
    file = home / "config.yaml"
    file.write_text(yaml.safe_dump({"applications": [{"import_path": IMPORT_PATH, "args": {"models": [model]}}]}))
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert f"model 'mine', kwargs.model_name: {name}: " in str(caught.value)
    assert said.format(home=home).replace("(it has checkpoints, empty)", "(it has ") in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["gpt2", "org/name", "org/Name-1.5_b", "./checkpoints/run-12", "~/checkpoints", ".\\checkpoints", "https://x/y/z"],
)
def test_names_that_may_be_right(home: Path, name: str) -> None:
    check_folders({"model_name": name, "other": "/no/such", "path": 3, "model": ""})


def test_a_name_that_could_be_either_names_both(home: Path) -> None:
    models = [{"id": "mine", "loader": "model_loaders.auto:load_model", "kwargs": {"model_name": "checkpoint"}}]

    async def load() -> None:
        host = ModelHost(read_args({"models": models}), "cpu")
        try:
            await host.load("mine")
        finally:
            await host.close()

    with pytest.raises(ModelLoadFailed) as caught:
        asyncio.run(load())
    assert caught.value.message.startswith("Model 'mine': ")
    assert "checkpoint is not a local folder" in caught.value.message
    assert "did you mean 'checkpoints'?" in caught.value.message
    assert "The Hub does not have it either" in caught.value.message


def test_messages_name_the_id_of_the_configuration() -> None:
    models = [{"id": "mine", "loader": "model_loaders.demo:load_model"}]

    async def embed() -> None:
        host = ModelHost(read_args({"models": models}), "cpu")
        try:
            async with host.lease("mine") as model:
                assert model.info.model_name == "demo"
                model.hooks.check_images("messages")
        finally:
            await host.close()

    with pytest.raises(Exception, match="Model 'mine' takes no images"):
        asyncio.run(embed())


def test_a_repository_in_the_cache_of_the_hub_is_taken_though_a_folder_has_its_owners_name(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
    with pytest.raises(ModelLoadFailed):
        check_folders({"model_name": "checkpoints/qwen"})
    (home / "cache" / "models--checkpoints--qwen" / "snapshots" / "1a2b").mkdir(parents=True)
    check_folders({"model_name": "checkpoints/qwen"})
    check_folders({"model_name": "other/qwen", "tokenizer": "gpt2"})
    with pytest.raises(ModelLoadFailed):
        check_folders({"tokenizer": "checkpoints/other"})


@pytest.mark.parametrize("text", ["x" * 5000, "{% for m in messages %}" * 20, "~nobody/x", "a\0b", "/proc/1/root/x"])
def test_a_text_that_can_be_no_path_is_an_argument_like_any_other(home: Path, text: str) -> None:
    entry = {"id": "m", "loader": "tests.tiny:llama", "kwargs": {"chat_template": text}}
    assert read_args({"models": [entry]}).models[0].kwargs["chat_template"] == text
    assert not os.path.exists(found(text))
    assert model_files({"path": text}) == []
