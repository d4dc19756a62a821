"""Flags and environment variables of transformers-openai-api, read as it documents them and not as it read them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.serve_file import base_url, read_config
from deployments.compat.flags import FLAGS, notes, read_flags, serve_config
from deployments.core.errors import ConfigError

MODEL = ["--hf-model", "org/name"]
ROOT = Path(__file__).parents[2]


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
        "engine": {"max_batch_size": 50, "torch_compile": "reduce-overhead"},
        "pinned": True,
    }


def test_the_readmes_variables() -> None:
    model = entry(HF_MODEL="org/name", HOTLOAD="false", TORCH_DTYPE="bfloat16", ATTN_IMPLEMENTATION="flash_attention_2")
    assert model["pinned"] is False
    assert model["kwargs"]["dtype"] == "bfloat16"
    assert model["kwargs"]["attn_implementation"] == "flash_attention_2"
    assert entry(*MODEL, USE_FLASH_ATTENTION_2="true")["kwargs"]["attn_implementation"] == "flash_attention_2"


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.name != "hqq"], ids=lambda flag: flag.name)
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
    assert ("torch_compile" in entry(*MODEL, "--torch-compile", text)["engine"]) is means
    assert ("torch_compile" in entry(*MODEL, TORCH_COMPILE=text)["engine"]) is means


@pytest.mark.parametrize("text", ["true", "True", "1", "yes"])
def test_hqq_is_refused_with_what_to_use_instead(text: str) -> None:
    for source, argv, variables in ((f"--hqq {text}", ["--hqq", text], {}), (f"HQQ {text}", [], {"HQQ": text})):
        with pytest.raises(ConfigError, match=f"^{source}: HQQ is not supported.*load_in_4bit: true.*kwargs"):
            config(*MODEL, *argv, **variables)
    for off in ("false", "0"):
        assert "quantization_config" not in entry(*MODEL, "--hqq", off, HQQ=text)["kwargs"]


def test_a_refused_flag_ends_the_command_with_status_2() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in {flag.env for flag in FLAGS}}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in ([sys.executable, "-m", "deployments.cli.main", "serve-compat"], ["scripts/serve"]):
        done = subprocess.run(
            [*command, "--hf-model", "org/name", "--hqq", "true"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("troupe: --hqq true: HQQ is not supported")


TRITON = {"TRITON_SERVER_HOST": "192.168.0.7", "TOKENIZER_PATH": "Qwen/Qwen1.5-1.8B-Chat"}


def test_a_model_of_a_triton_server() -> None:
    """The variables of fastapi_tritonserver's image."""
    written = config(**TRITON, TRITON_SERVER_PORT="8002", MODEL_TYPE="qwen2-chat", WORKERS="4")
    (application,) = written["applications"]
    assert application["args"]["models"] == [
        {
            "id": "tensorrt_llm",
            "aliases": ["model", "gpt-3.5-turbo"],
            "loader": "model_loaders.backends.triton:load_model",
            "kwargs": {
                "server_url": "192.168.0.7:8002",
                "triton_model": "tensorrt_llm",
                "tokenizer_name": "Qwen/Qwen1.5-1.8B-Chat",
            },
            "engine": {"max_batch_size": 4},
            "pinned": True,
        }
    ]
    assert application["deployments"][0]["ray_actor_options"] == {"num_gpus": 0}
    assert written["http_options"] == {"port": 9900}
    assert config(**TRITON, PORT="80")["http_options"] == {"port": 80}
    assert entry(**TRITON)["kwargs"]["server_url"] == "192.168.0.7:8001"
    seeing = config(**TRITON, MODEL_TYPE="qwen-vl", MEDIA_URLS="true")["applications"][0]["args"]
    assert seeing["models"][0]["kwargs"]["vision"] is True
    assert seeing["api"] == {"media_urls": True}
    assert "api" not in config(**TRITON, MODEL_TYPE="qwen-vl")["applications"][0]["args"]
    assert entry("--triton-model", "ensemble", **TRITON)["id"] == "ensemble"
    with pytest.raises(ConfigError, match=r"TRITON_SERVER_HOST '192.168.0.7': set TOKENIZER_PATH too"):
        config(TRITON_SERVER_HOST="192.168.0.7")


def test_a_folder_of_ctranslate2(tmp_path: Path) -> None:
    """By ctranslate2-fastapi's variable, and as the model of an image."""
    folder = tmp_path / "LaMini"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"LLM_ARTIFACT_DIR '.*LaMini' has no model.bin"):
        config(LLM_ARTIFACT_DIR=str(folder))
    (folder / "model.bin").touch()
    expected = {"loader": "model_loaders.backends.ctranslate2:load_model", "kwargs": {"model_path": str(folder)}}
    written = config(LLM_ARTIFACT_DIR=str(folder), MAX_CONCURRENT="8", ACCELERATOR_TYPE="cpu")
    (model,) = written["applications"][0]["args"]["models"]
    assert model == {"id": "LaMini", "aliases": ["model"], **expected, "engine": {"max_batch_size": 8}, "pinned": True}
    assert written["http_options"] == {"port": 8000}
    assert written["applications"][0]["deployments"][0]["ray_actor_options"] == {"num_gpus": 0}
    assert expected.items() <= entry(HF_MODEL=str(folder)).items()
    (folder / "model.safetensors").touch()  # a checkpoint of transformers with a conversion beside it
    assert entry(HF_MODEL=str(folder))["loader"] == "model_loaders.auto:load_model"


def test_a_named_model_goes_before_a_server_and_that_before_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    both = {**TRITON, "LLM_ARTIFACT_DIR": str(tmp_path)}
    assert entry(*MODEL, **both)["loader"] == "model_loaders.auto:load_model"
    assert entry(**both)["loader"] == "model_loaders.backends.triton:load_model"
    said = notes(*read_flags(MODEL, both))
    assert "--tokenizer-path has no effect: --hf-model is served" in said
    said = notes(*read_flags([], {**TRITON, "TORCH_DTYPE": "float16", "WORKERS": "2"}))
    assert said == ["--torch-dtype has no effect: Triton computes the model"]
    said = notes(*read_flags([], {"LLM_ARTIFACT_DIR": str(tmp_path), "WORKERS": "2"}))
    assert said == ["--workers has no effect: CTranslate2 computes the model"]


def test_concurrency_is_the_smaller_of_both_limits() -> None:
    assert entry(*MODEL)["engine"]["max_batch_size"] == 20
    assert entry(*MODEL, MAX_CONCURRENT="50")["engine"]["max_batch_size"] == 50
    both = entry(*MODEL, MAX_CONCURRENT="50", CONTINUOUS_BATCHING_BATCH_SIZE="8")
    assert both["engine"]["max_batch_size"] == 8


def test_caches_compilation_and_profiling() -> None:
    model = entry(
        *MODEL, "--static-cache", "true", "--static-cache-decoder-max-length", "512", "--torch-compile", "true",
        "--torch-compile-mode", "max-autotune", "--torch-profiling", "true",
    )  # fmt: skip
    assert model["engine"] == {
        "max_batch_size": 20,
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
    command = [sys.executable, "-m", "deployments.cli.main", "serve-compat", "--print-config", "--hf-model", "./model"]
    environment = {key: value for key, value in os.environ.items() if key not in {flag.env for flag in FLAGS}}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    file = tmp_path / "kept.yaml"
    file.write_text(done.stdout)
    written, args = read_config(file)
    assert args.models[0].kwargs["model_name"] == str(tmp_path / "model")  # found again from anywhere
    assert base_url(written) == "http://127.0.0.1:7088"
