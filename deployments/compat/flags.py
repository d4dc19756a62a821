"""A configuration from the flags and environment variables of transformers-openai-api, and of two other servers.

    troupe serve-compat --hf-model org/name --torch-dtype float16           # or HF_MODEL=org/name troupe serve-compat
    TRITON_SERVER_HOST=10.0.0.7 TOKENIZER_PATH=org/name troupe serve-compat # a model of a Triton server
    LLM_ARTIFACT_DIR=folder troupe serve-compat                             # a model that was converted to CTranslate2
    troupe serve-compat --hf-model org/name --print-config > my_config.yaml # the configuration alone

A flag overrides its environment variable. A flag without a counterpart is refused if it would change an
answer; otherwise stderr names it.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.compat import backends
from deployments.config.app import IMPORT_PATH, parse_args
from deployments.core.errors import ConfigError

PORT = 7088
"""Where the clients of transformers-openai-api look."""


def _boolean(text: str) -> bool:
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.strip().lower())
    if value is None:
        raise ValueError("write true or false")
    return value


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"write {' or '.join(allowed)}")
        return text

    return read


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag, its environment variable and how its text is read. `default` is used if neither is given."""

    name: str
    env: str
    read: Callable[[str], Any] = str
    default: Any = None
    help: str = ""


FLAGS = (
    Flag("hf-model", "HF_MODEL", help="Hub id or local folder"),
    Flag("host", "HOSTNAME", help="address to listen on (default: 127.0.0.1)"),
    Flag("port", "PORT", int, help="port to listen on (default: 7088; Triton: 9900; CTranslate2: 8000)"),
    Flag("loglevel", "LOGLEVEL", str.upper, "INFO", "logging level"),
    Flag("model-type", "MODEL_TYPE", help="class of transformers, or package.Class (default: the checkpoint's own)"),
    Flag("tokenizer-type", "TOKENIZER_TYPE", _one_of("AutoTokenizer", "AutoProcessor"), help="AutoTokenizer"),
    Flag("processor-type", "PROCESSOR_TYPE", _one_of("AutoTokenizer", "AutoProcessor"), help="AutoProcessor"),
    Flag("tokenizer-use-fast", "TOKENIZER_USE_FAST", _boolean, True, "true"),
    Flag("torch-dtype", "TORCH_DTYPE", help="such as bfloat16 (default: depends on checkpoint and device)"),
    Flag("architecture-type", "ARCHITECTURE_TYPE", _one_of("decoder", "encoder-decoder"), "decoder"),
    Flag("serving-type", "SERVING_TYPE", _one_of("chat", "whisper"), "chat", "chat or whisper"),
    Flag("accelerator-type", "ACCELERATOR_TYPE", _one_of("cuda", "cpu"), "cuda", "cuda (the CPU if there is no GPU)"),
    Flag("max-concurrent", "MAX_CONCURRENT", int, help="requests computed together; more requests wait"),
    Flag("continuous-batching-batch-size", "CONTINUOUS_BATCHING_BATCH_SIZE", int, help="the same"),
    Flag("continuous-batching-microsleep", "CONTINUOUS_BATCHING_MICROSLEEP", float),
    Flag("continuous-batching", "CONTINUOUS_BATCHING", _boolean),
    Flag("continous-batching", "CONTINOUS_BATCHING", _boolean),
    Flag("static-cache", "STATIC_CACHE", _boolean, False, "keep the KV cache at its full length"),
    Flag("static-cache-encoder-max-length", "STATIC_CACHE_ENCODER_MAX_LENGTH", int),
    Flag(
        "static-cache-decoder-max-length",
        "STATIC_CACHE_DECODER_MAX_LENGTH",
        int,
        help="length of the KV cache in tokens",
    ),
    Flag("cache-type", "CACHE_TYPE", _one_of("DynamicCache", "StaticCache"), "DynamicCache"),
    Flag("attn-implementation", "ATTN_IMPLEMENTATION", help="such as sdpa or flash_attention_2"),
    Flag("hqq", "HQQ", _boolean, False, "refused if true: use bitsandbytes, see docs/from/transformers-openai-api.md"),
    Flag("torch-compile", "TORCH_COMPILE", _boolean, False, "compile the decode forward"),
    Flag("torch-compile-mode", "TORCH_COMPILE_MODE", default="reduce-overhead", help="mode of torch.compile"),
    Flag("torch-profiling", "TORCH_PROFILING", _boolean, False, "write a trace of the first requests to ./profile"),
    Flag("torch-autograd-profiling", "TORCH_AUTOGRAD_PROFILING", _boolean, False, "the same"),
    Flag("hotload", "HOTLOAD", _boolean, True, "load the model at start; false: at the first request"),
    Flag("reasoning-parser", "REASONING_PARSER", _one_of("none", "deepseek_r1"), "none", "none or deepseek_r1"),
    Flag("media-urls", "MEDIA_URLS", _boolean, False, "fetch images and recordings that messages name by http(s) URL"),
    Flag("pagedattention", "PAGEDATTENTION", _boolean),
    Flag("pagedattention-block-size", "PAGEDATTENTION_BLOCK_SIZE", int),
    Flag("triton-server-host", "TRITON_SERVER_HOST", help="host of a Triton server whose model is served"),
    Flag("triton-server-port", "TRITON_SERVER_PORT", int, 8001, "its gRPC port"),
    Flag("triton-model", "TRITON_MODEL", default="tensorrt_llm", help="the model's name on the Triton server"),
    Flag("tokenizer-path", "TOKENIZER_PATH", help="Hub id or folder of the tokenizer of a Triton server's model"),
    Flag("workers", "WORKERS", int, help="requests sent to a Triton server at a time"),
    Flag("llm-artifact-dir", "LLM_ARTIFACT_DIR", help="folder of a model that was converted to CTranslate2"),
)
HQQ = (
    "{source} {text}: HQQ is not supported, as no environment of Troupe has it. Use bitsandbytes: write the "
    "configuration without it (troupe serve-compat --print-config), add quantization_config: "
    "{{quant_method: bitsandbytes, load_in_4bit: true}} to the model's kwargs, and serve that file."
)
# Steps of the other servers' loops that ours does not have; no answer depends on them.
WITHOUT_EFFECT = {
    "continuous_batching_microsleep": "a step starts when the last one has ended",
    "continuous_batching": "it is always on if the model allows it",
    "continous_batching": "it is always on if the model allows it",
    "static_cache_encoder_max_length": "encoder inputs keep their length",
    "pagedattention": "continuous batching keeps each KV cache in one piece",
    "pagedattention_block_size": "continuous batching keeps each KV cache in one piece",
}


def read_flags(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[dict[str, Any], set[str]]:
    """Every flag's value by name (underscores for dashes), and the names that were given.

    Raises:
        ConfigError: a value cannot be read.
        SystemExit: an unknown flag, or --help.
    """
    parser = _parser()
    texts = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    given: set[str] = set()
    for flag in FLAGS:
        name = flag.name.replace("-", "_")
        source, text = f"--{flag.name}", texts[name]
        if text is None and _is_meant(flag, environment.get(flag.env, "")):
            source, text = flag.env, environment[flag.env]
        values[name] = flag.default
        if text is not None:
            given.add(name)
            values[name] = _read(flag, source, text)
            if name == "hqq" and values[name]:
                raise ConfigError(HQQ.format(source=source, text=text))
    if environment.get("USE_FLASH_ATTENTION_2", "").lower() in ("1", "true") and "attn_implementation" not in given:
        values["attn_implementation"] = "flash_attention_2"
    return values, given


def serve_config(values: Mapping[str, Any], given: set[str]) -> dict[str, Any]:
    """The Ray Serve configuration that flags mean.

    Raises:
        ConfigError: a flag is missing, or asks for what cannot be had.
    """
    backend = _backend(values)
    if backend == "triton":
        model, port = backends.triton_entry(values), backends.TRITON_PORT
    elif backend == "ctranslate2":
        model, port = backends.ctranslate2_entry(values), backends.CTRANSLATE2_PORT
    else:
        model, port = _entry(values, given), PORT
    if values["reasoning_parser"] == "deepseek_r1":
        model["api"] = {"reasoning_parser": "think"}
    args: dict[str, Any] = {"models": [{key: value for key, value in model.items() if value not in ({}, [])}]}
    if values["media_urls"]:
        args["api"] = {"media_urls": True}
    parse_args(args)
    host = {} if values["host"] is None else {"host": values["host"]}
    application: dict[str, Any] = {"name": "troupe", "route_prefix": "/", "import_path": IMPORT_PATH, "args": args}
    if values["accelerator_type"] == "cpu" or backend == "triton":
        replica = {"name": "ModelReplica", "num_replicas": 1, "ray_actor_options": {"num_gpus": 0}}
        application["deployments"] = [replica]
    return {
        "http_options": {**host, "port": values["port"] or port},
        "logging_config": {"log_level": values["loglevel"]},
        "applications": [application],
    }


def _backend(values: Mapping[str, Any]) -> str | None:
    """The backend of the model; None is transformers. A model name overrides a server, which overrides a folder."""
    if values["hf_model"]:
        return "ctranslate2" if backends.is_ctranslate2(Path(values["hf_model"]).expanduser()) else None
    if values["triton_server_host"]:
        return "triton"
    return "ctranslate2" if values["llm_artifact_dir"] else None


def _entry(values: Mapping[str, Any], given: set[str]) -> dict[str, Any]:
    """The entry under `models` of a model that transformers computes."""
    if not values["hf_model"]:
        raise ConfigError("No model: give --hf-model (or HF_MODEL) a Hub id or a local folder.")
    if not values["tokenizer_use_fast"]:
        raise ConfigError("--tokenizer-use-fast false: transformers has no slow tokenizers any more; write a loader.")
    name = values["hf_model"]
    model = {
        "id": name,
        "aliases": [] if name == "model" else ["model"],
        "loader": "model_loaders.auto:load_model",
        "kwargs": _loader_kwargs(values),
        "engine": _engine(values, given),
        "pinned": values["hotload"],
    }
    if values["torch_profiling"] or values["torch_autograd_profiling"]:
        model["profile_dir"] = str(Path("profile").resolve())
    return model


def notes(values: Mapping[str, Any], given: set[str]) -> list[str]:
    """The flags that have no effect, with the reason."""
    backend = _backend(values)
    reasons = WITHOUT_EFFECT | dict.fromkeys(
        ("triton_server_host", "triton_server_port", "triton_model", "tokenizer_path", "workers", "llm_artifact_dir"),
        "--hf-model is served",
    )
    if backend is not None:
        known = backends.TRITON_FLAGS if backend == "triton" else backends.CTRANSLATE2_FLAGS
        reason = f"{'Triton' if backend == 'triton' else 'CTranslate2'} computes the model"
        reasons = {name: reason for name in values if name not in known}
    names = [name for name in reasons if name in given and values[name] is not False]
    return [f"--{name.replace('_', '-')} has no effect: {reasons[name]}" for name in names]


def _loader_kwargs(values: Mapping[str, Any]) -> dict[str, Any]:
    folder = Path(values["hf_model"]).expanduser()
    kwargs: dict[str, Any] = {"model_name": str(folder.resolve()) if folder.is_dir() else values["hf_model"]}
    model_type = values["model_type"]
    if model_type not in (None, "AutoModelForCausalLM"):
        if "." in model_type and importlib.util.find_spec(model_type.split(".")[0]) is None:
            raise ConfigError(f"--model-type {model_type}: no package {model_type.split('.')[0]!r} is installed.")
        kwargs["auto_class"] = model_type
    elif values["architecture_type"] == "encoder-decoder":
        kwargs["auto_class"] = "AutoModelForSeq2SeqLM"
    if values["architecture_type"] == "encoder-decoder":
        # An encoder reads one text: the contents of the messages, a line each.
        kwargs["chat_template"] = "{{ messages | map(attribute='content') | join('\\n') }}"
    elif values["serving_type"] == "chat":
        kwargs["plain_chat"] = True
    optional = {"dtype": values["torch_dtype"], "attn_implementation": values["attn_implementation"]}
    kwargs.update({key: value for key, value in optional.items() if value is not None})
    return kwargs


def _engine(values: Mapping[str, Any], given: set[str]) -> dict[str, Any]:
    engine: dict[str, Any] = {}
    limits = [values[n] for n in ("max_concurrent", "continuous_batching_batch_size") if values[n] is not None]
    engine["max_batch_size"] = min(limits, default=20)
    if values["static_cache"] or values["cache_type"] == "StaticCache":
        engine["static_cache"] = True
        if "static_cache_decoder_max_length" in given:
            engine["max_model_len"] = values["static_cache_decoder_max_length"]
    if values["torch_compile"]:
        engine["torch_compile"] = values["torch_compile_mode"]
    return engine


def _is_meant(flag: Flag, text: str) -> bool:
    """Whether an environment variable is meant as a setting: in most shells, HOSTNAME is the machine's name."""
    if flag.env != "HOSTNAME" or text == "localhost":
        return text != ""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _read(flag: Flag, source: str, text: str) -> Any:
    try:
        return flag.read(text)
    except ValueError as error:
        reason = str(error) if "write" in str(error) else f"write {flag.read.__name__}"
        raise ConfigError(f"{source} {text!r} cannot be read; {reason}.") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="troupe serve-compat",
        description="Serve one model by the flags and variables of other servers. --fast, --verbose and --print-config "
        "are as for `troupe serve`.",
        allow_abbrev=False,
    )
    for flag in FLAGS:
        default = str(flag.default).lower() if isinstance(flag.default, bool) else flag.default
        shown = f"{flag.help} (env: {flag.env}" + ("" if default is None else f", default: {default}")
        parser.add_argument(f"--{flag.name}", help=f"{shown})")
    return parser


def are_meant(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the arguments of scripts/serve are these flags, and not those of `troupe serve`.

    They are if one of them is a flag that only this module has, or if a variable names the model and they do not.
    """
    typed = {argument.partition("=")[0] for argument in arguments}
    if typed & {f"--{flag.name}" for flag in FLAGS if flag.name not in _SHARED}:
        return True
    named = any(environment.get(name) for name in ("HF_MODEL", "TRITON_SERVER_HOST", "LLM_ARTIFACT_DIR"))
    return named and all(
        _is_shared(before, argument) for before, argument in zip(["", *arguments], arguments, strict=False)
    )


_SHARED = ("host", "port")


def _is_shared(before: str, argument: str) -> bool:
    """Whether an argument is an option that both commands have, or the value of one."""
    return argument.startswith("-") or before in [f"--{name}" for name in _SHARED]


def config_from_flags(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """The configuration that flags and variables mean. Names the flags without effect on stderr.

    Raises:
        ConfigError: as of `read_flags` and `serve_config`.
        SystemExit: an unknown flag, or --help.
    """
    values, given = read_flags(arguments, environment)
    config = serve_config(values, given)
    for note in notes(values, given):
        print(f"troupe: {note}", file=sys.stderr)
    return config
