"""Models that Triton or CTranslate2 computes, from the variables of fastapi_tritonserver and ctranslate2-fastapi."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.core.errors import ConfigError

TRITON_PORT, CTRANSLATE2_PORT = 9900, 8000
"""Where the clients of those servers look."""

_COMMON = {"host", "port", "loglevel", "hotload", "reasoning_parser", "media_urls"}
TRITON_FLAGS = {"triton_server_host", "triton_server_port", "triton_model", "tokenizer_path", "workers", "model_type"}
TRITON_FLAGS |= _COMMON
CTRANSLATE2_FLAGS = {"hf_model", "llm_artifact_dir", "max_concurrent", "continuous_batching_batch_size"}
CTRANSLATE2_FLAGS |= {"accelerator_type"} | _COMMON
"""The flags that have a meaning there."""


def is_ctranslate2(folder: Path) -> bool:
    """Whether a folder holds a model that was converted to CTranslate2, and no checkpoint of transformers."""
    return (folder / "model.bin").is_file() and not any(
        [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    )


def triton_entry(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entry under `models` of a model that a Triton server runs.

    Args:
        values: of the flags, by name.

    Raises:
        ConfigError: no tokenizer is named.
    """
    tokenizer = values["tokenizer_path"]
    if not tokenizer:
        raise ConfigError(
            f"TRITON_SERVER_HOST {values['triton_server_host']!r}: set TOKENIZER_PATH too, to the Hub id or the folder "
            "of the model's tokenizer."
        )
    folder = Path(tokenizer).expanduser()
    kwargs: dict[str, Any] = {
        "server_url": f"{values['triton_server_host']}:{values['triton_server_port']}",
        "triton_model": values["triton_model"],
        "tokenizer_name": str(folder.resolve()) if folder.is_dir() else tokenizer,
    }
    if values["model_type"] == "qwen-vl":
        kwargs["vision"] = True
    engine = {} if values["workers"] is None else {"max_batch_size": values["workers"]}
    return {
        "id": values["triton_model"],
        "aliases": [name for name in ("model", "gpt-3.5-turbo") if name != values["triton_model"]],
        "loader": "model_loaders.backends.triton:load_model",
        "kwargs": kwargs,
        "engine": engine,
        "pinned": True,
    }


def ctranslate2_entry(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entry under `models` of a folder with a converted model.

    Raises:
        ConfigError: LLM_ARTIFACT_DIR names a folder without one.
    """
    folder = Path(values["hf_model"] or values["llm_artifact_dir"]).expanduser().resolve()
    if not is_ctranslate2(folder):
        raise ConfigError(
            f"LLM_ARTIFACT_DIR {str(folder)!r} has no model.bin of CTranslate2; convert a Hugging Face folder with "
            "scripts/convert_ctranslate2, or serve it with HF_MODEL."
        )
    limits = [values[name] for name in ("max_concurrent", "continuous_batching_batch_size") if values[name] is not None]
    return {
        "id": values["hf_model"] or folder.name,
        "aliases": ["model"],
        "loader": "model_loaders.backends.ctranslate2:load_model",
        "kwargs": {"model_path": str(folder)},
        "engine": {"max_batch_size": min(limits)} if limits else {},
        "pinned": values["hotload"],
    }
