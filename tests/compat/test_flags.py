"""Flags and environment variables of transformers-openai-api, read as it documents them and not as it read them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cli.serve_file import base_url, read_config
from deployments.compat.flags import FLAGS, notes, read_flags, serve_config
from deployments.core.errors import ConfigError

MODEL = ["--hf-model", "org/name"]


def config(*argv: str, **environment: str) -> dict[str, Any]:
    return serve_config(*read_flags(list(argv), environment))


def entry(*argv: str, **environment: str) -> dict[str, Any]:
    (model,) = config(*argv, **environment)["applications"][0]["args"]["models"]
    return model  # type: ignore[no-any-return]


def test_the_readmes_example() -> None:
    model = entry(
        "--host", "0.0.0.0", "--port", "7088", "--hf-model", "microsoft/DialoGPT-medium", "--torch-dtype", "float16",
        "--max-concurrent", "50", "--torch-compile", "True",
    )  # fmt: skip
    assert model == {
        "id": "microsoft/DialoGPT-medium",
        "aliases": ["model"],
        "loader": "model_loaders.auto:load_model",
        "kwargs": {"model_name": "microsoft/DialoGPT-medium", "plain_chat": True, "dtype": "float16"},
        "engine": {"max_rows": 50, "torch_compile": "reduce-overhead"},
        "pinned": True,
    }


def test_the_readmes_variables() -> None:
    model = entry(HF_MODEL="org/name", HOTLOAD="false", TORCH_DTYPE="bfloat16", ATTN_IMPLEMENTATION="flash_attention_2")
    assert model["pinned"] is False
    assert model["kwargs"]["dtype"] == "bfloat16"
    assert model["kwargs"]["attn_implementation"] == "flash_attention_2"
    assert entry(*MODEL, USE_FLASH_ATTENTION_2="true")["kwargs"]["attn_implementation"] == "flash_attention_2"


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_flag_is_also_a_variable_and_the_flag_wins(flag: Any) -> None:
    text, other = {
        "_boolean": ("true", "false"),
        "int": ("3", "4"),
        "float": ("0.5", "0.25"),
        "upper": ("debug", "INFO"),
    }.get(flag.read.__name__, ("a/b", "c/d"))
    if flag.read.__name__ == "read":
        text = other = flag.default or "AutoTokenizer"
    if flag.env == "HOSTNAME":
        text, other = "10.0.0.1", "10.0.0.2"
    name = flag.name.replace("-", "_")
    by_variable, given = read_flags([], {flag.env: text})
    assert by_variable[name] == flag.read(text)
    assert given == {name}
    by_flag, _ = read_flags([f"--{flag.name}", other], {flag.env: text})
    assert by_flag[name] == flag.read(other)


@pytest.mark.parametrize(("text", "means"), [("False", False), ("false", False), ("0", False), ("True", True)])
def test_false_is_false(text: str, means: bool) -> None:
    """CalunVier's type=bool read "False" as true; malaysia-ai's HQQ and TORCH_COMPILE variables were inverted."""
    assert ("quantization_config" in entry(*MODEL, "--hqq", text)["kwargs"]) is means
    assert ("quantization_config" in entry(*MODEL, HQQ=text)["kwargs"]) is means
    assert ("torch_compile" in entry(*MODEL, TORCH_COMPILE=text)["engine"]) is means


def test_concurrency_is_the_smaller_of_both_limits() -> None:
    assert entry(*MODEL)["engine"]["max_rows"] == 20
    assert entry(*MODEL, MAX_CONCURRENT="50")["engine"]["max_rows"] == 50
    both = entry(*MODEL, MAX_CONCURRENT="50", CONTINUOUS_BATCHING_BATCH_SIZE="8")
    assert both["engine"]["max_rows"] == 8


def test_caches_compilation_and_profiling() -> None:
    model = entry(
        *MODEL, "--static-cache", "true", "--static-cache-decoder-max-length", "512", "--torch-compile", "true",
        "--torch-compile-mode", "max-autotune", "--torch-profiling", "true",
    )  # fmt: skip
    assert model["engine"] == {
        "max_rows": 20,
        "static_cache": True,
        "max_model_len": 512,
        "torch_compile": "max-autotune",
    }
    assert model["profile_dir"] == str(Path("profile").resolve())
    assert entry(*MODEL, CACHE_TYPE="StaticCache")["engine"]["static_cache"] is True


def test_classes_and_architectures() -> None:
    assert "auto_class" not in entry(*MODEL, MODEL_TYPE="AutoModelForCausalLM")["kwargs"]
    assert entry(*MODEL, MODEL_TYPE="LlamaForCausalLM")["kwargs"]["auto_class"] == "LlamaForCausalLM"
    seq2seq = entry(*MODEL, ARCHITECTURE_TYPE="encoder-decoder")["kwargs"]
    assert seq2seq["auto_class"] == "AutoModelForSeq2SeqLM"
    assert "chat_template" in seq2seq
    assert entry(*MODEL, REASONING_PARSER="deepseek_r1")["api"] == {"reasoning_parser": "think"}


def test_where_it_listens() -> None:
    assert config(*MODEL)["http_options"] == {"port": 7088}
    assert config(*MODEL, HOSTNAME="342191005112")["http_options"] == {"port": 7088}  # a container's name
    assert config(*MODEL, HOSTNAME="0.0.0.0", PORT="80")["http_options"] == {"host": "0.0.0.0", "port": 80}
    cpu = config(*MODEL, ACCELERATOR_TYPE="cpu", LOGLEVEL="debug")
    assert cpu["applications"][0]["deployments"][0]["ray_actor_options"] == {"num_gpus": 0}
    assert cpu["logging_config"] == {"log_level": "DEBUG"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--hf-model"),
        ([*MODEL, "--port", "many"], "--port 'many' cannot be read; write int"),
        ([*MODEL, "--hqq", "maybe"], "write true or false"),
        ([*MODEL, "--accelerator-type", "neuronx"], "write cuda or cpu"),
        ([*MODEL, "--cache-type", "QuantizedCache"], "DynamicCache or StaticCache"),
        ([*MODEL, "--model-type", "auto_gptq.AutoGPTQForCausalLM"], "no package 'auto_gptq'"),
        ([*MODEL, "--tokenizer-use-fast", "false"], "slow tokenizers"),
    ],
)
def test_what_cannot_be_had_is_named(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(*argv)


def test_what_has_no_effect_is_said() -> None:
    given = read_flags([*MODEL, "--continuous-batching-microsleep", "0.001", "--pagedattention", "false"], {})
    (note,) = notes(*given)
    assert note.startswith("--continuous-batching-microsleep has no effect")


def test_the_command_writes_a_configuration_that_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    command = [sys.executable, "-m", "deployments.compat.flags", "--hf-model", "./model"]
    environment = {key: value for key, value in os.environ.items() if key not in {flag.env for flag in FLAGS}}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    file = tmp_path / "kept.yaml"
    file.write_text(done.stdout)
    written, args = read_config(file)
    assert args.models[0].kwargs["model_name"] == str(tmp_path / "model")  # found again from anywhere
    assert base_url(written) == "http://127.0.0.1:7088"
    helped = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert yaml.safe_load(helped.stdout) is None
    assert "--hf-model" in helped.stderr
