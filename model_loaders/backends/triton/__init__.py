"""A model on a Triton Inference Server, with TensorRT-LLM's tensors, over gRPC.

- id: qwen
  loader: model_loaders.backends.triton:load_model
  kwargs: {server_url: "10.0.0.5:8001", triton_model: tensorrt_llm, tokenizer_name: Qwen/Qwen1.5-1.8B-Chat}

The model is `tensorrt_llm` (token ids in and out) or `ensemble` (text in and out). The loader asks the server which one
it is, and which tensors it has.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.utils import cached_file

from deployments.config.engine import EngineOptions
from deployments.core.errors import ModelLoadFailed
from deployments.engine.base.protocol import Engine
from model_loaders.contract import ModelInfo
from model_loaders.text_side import read_template

__all__ = ["load_model"]


def load_model(
    server_url: str | None = None,
    *,
    triton_model: str = "tensorrt_llm",
    model_version: str = "",
    tokenizer_name: str | None = None,
    vision: bool = False,
    chat_template: str | None = None,
    plain_chat: bool = False,
    max_model_len: int | None = None,
    generation_defaults: bool = False,
    accumulated: bool = False,
    response_timeout_s: float = 600.0,
    ssl: bool = False,
    trust_remote_code: bool = False,
) -> ModelInfo:
    """Connect to a model of a Triton server.

    The server need not be up: requests are answered with 503 until it is.

    Args:
        server_url: its gRPC address, host:port; None takes $TRITON_SERVER_HOST and $TRITON_SERVER_PORT, else
            127.0.0.1:8001.
        triton_model: its name there.
        model_version: its version there; "" leaves it to the server.
        tokenizer_name: Hub id or folder of the tokenizer; None takes $TOKENIZER_PATH.
        vision: encode images with the processor of `tokenizer_name`; its pixel values become `image_input`.
        chat_template: a Jinja template, or the path of a file that holds one.
        plain_chat: answer chats as `Role: text` lines if there is no template.
        max_model_len: positions, prompt and text together, of the engine that the server runs; None takes those of
            the config in `tokenizer_name`.
        generation_defaults: parameters that a request leaves at the value that changes nothing (temperature 1, top_p
            1, top_k 0, penalties 1) are taken from the model's generation_config.json.
        accumulated: each response of a stream repeats what came before it.
        response_timeout_s: how long the server may take for the next token.
        ssl: encrypt the connection.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        ModelLoadFailed: no tokenizer, or the client library is missing.
    """
    name = tokenizer_name or os.environ.get("TOKENIZER_PATH")
    if not name:
        raise ModelLoadFailed("No tokenizer: give the loader tokenizer_name, or set TOKENIZER_PATH.")
    url = server_url or _url_of_environment()
    generation = _json_of(name, "generation_config.json")
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code) if vision else None
    tokenizer = getattr(processor, "tokenizer", None) or AutoTokenizer.from_pretrained(
        name, trust_remote_code=trust_remote_code
    )

    def engine(info: ModelInfo, options: EngineOptions) -> Engine:
        from model_loaders.backends.triton.engine import TritonEngine
        from model_loaders.backends.triton.server import Server

        server = Server(url, triton_model, version=model_version, ssl=ssl, timeout=response_timeout_s)
        defaults = generation if generation_defaults else {}
        return TritonEngine(info, options, server, defaults=defaults, accumulated=accumulated)

    return ModelInfo(
        model_name=triton_model,
        processor=processor,
        tokenizer=tokenizer,
        chat_template=read_template(chat_template),
        plain_chat=plain_chat,
        max_model_len=max_model_len or _positions(name, trust_remote_code),
        stop_token_ids=_ids(generation.get("eos_token_id")),
        engine=engine,
    )


def _url_of_environment() -> str:
    return f"{os.environ.get('TRITON_SERVER_HOST', '127.0.0.1')}:{os.environ.get('TRITON_SERVER_PORT', '8001')}"


def _json_of(name: str, file: str) -> dict[str, Any]:
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return {} if path is None else dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _positions(name: str, trust_remote_code: bool) -> int | None:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return None
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
