"""Models converted to CTranslate2: int8 and the like on the CPU, float16 on a GPU, without torch.

- id: lamini
  loader: model_loaders.backends.ctranslate2:load_model
  kwargs: {model_path: models/LaMini-Flan-T5-248M, compute_type: int8}

`scripts/convert_ctranslate2` makes such a folder from a Hugging Face one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deployments.config.engine import EngineOptions
from deployments.core.errors import ModelLoadFailed
from deployments.engine.base.protocol import Engine
from model_loaders.backends.ctranslate2.folder import Folder, instruction_chat
from model_loaders.contract import ModelInfo
from model_loaders.text_side import read_template

__all__ = ["load_model"]


def load_model(
    model_path: str | None = None,
    device: str = "cpu",
    *,
    compute_type: str | None = None,
    inter_threads: int = 1,
    intra_threads: int = 0,
    flash_attention: bool = False,
    tensor_parallel: bool = False,
    tokenizer_name: str | None = None,
    chat_template: str | None = None,
    prompt_fmt: str | None = None,
    plain_chat: bool = False,
    target_prefix: list[str] | None = None,
    max_model_len: int | None = None,
    batch_wait_ms: float = 5.0,
) -> ModelInfo:
    """Load a converted decoder (`ctranslate2.Generator`) or encoder-decoder (`ctranslate2.Translator`).

    Args:
        model_path: the folder, or the Hub id of a converted repository; None takes $LLM_ARTIFACT_DIR.
        device: "cpu", "cuda", or one GPU as in "cuda:0".
        compute_type: such as "int8", "int8_bfloat16", "float16" or "float32"; None takes `quantization` of
            bootstrap_config.json, else what the weights were saved with.
        inter_threads: batches computed at the same time.
        intra_threads: CPU threads of each; 0 leaves it to the library, `engine: {threads: n}` goes before it.
        flash_attention, tensor_parallel: the library's, for GPUs.
        tokenizer_name: Hub id or folder of the tokenizer, if it is not in the folder.
        chat_template: a Jinja template, or the path of a file that holds one.
        prompt_fmt: what a prompt becomes, with `{instruction}` in its place; for models without a chat template. None
            takes that of bootstrap_config.json.
        plain_chat: answer chats as `Role: text` lines if there is no template.
        target_prefix: tokens that every answer of an encoder-decoder begins with, such as a language code; they are
            not part of the text.
        max_model_len: positions, prompt and text together. None is twice `max_tokens` of bootstrap_config.json (its
            limit of the prompt and of the text), else what the tokenizer says.
        batch_wait_ms: how long a request that comes alone waits for others to be computed with.

    Raises:
        ModelLoadFailed: the library is missing, the folder holds no converted model, its vocabulary is not the
            tokenizer's, or the device cannot compute with this type.
    """
    folder = Folder(_local(model_path))
    tokenizer = folder.tokenizer(tokenizer_name)
    folder.check_vocabulary(tokenizer)
    bootstrap = folder.bootstrap
    model = folder.open(
        device,
        compute_type=compute_type or bootstrap.quantization,
        inter_threads=inter_threads,
        intra_threads=intra_threads,
        flash_attention=flash_attention,
        tensor_parallel=tensor_parallel,
    )

    def engine(info: ModelInfo, options: EngineOptions) -> Engine:
        from model_loaders.backends.ctranslate2.backend import GeneratorBackend, TranslatorBackend
        from model_loaders.backends.ctranslate2.engine import CTranslate2Engine

        loaded = model(options.threads)
        backend = (
            TranslatorBackend(loaded, folder, target_prefix or [])
            if folder.is_translator
            else GeneratorBackend(loaded, folder)
        )
        return CTranslate2Engine(info, options, backend, workers=inter_threads, wait=batch_wait_ms / 1000)

    template = read_template(chat_template)
    has_template = template is not None or bool(getattr(tokenizer, "chat_template", None))
    form = None if has_template else prompt_fmt or bootstrap.prompt_fmt
    return ModelInfo(
        model_name=bootstrap.name or folder.path.name,
        tokenizer=tokenizer,
        encode=None if form is None else _formatted(tokenizer, form),
        encode_kwargs={"add_special_tokens": True} if folder.is_translator else {},
        apply_chat_template=None if form is None or plain_chat else instruction_chat,
        chat_template=template,
        plain_chat=plain_chat,
        max_model_len=max_model_len or bootstrap.max_model_len,
        stop_token_ids=folder.terminators(),
        engine=engine,
    )


def _local(model_path: str | None) -> Path:
    given = model_path or os.environ.get("LLM_ARTIFACT_DIR")
    if not given:
        raise ModelLoadFailed("No model folder: give the loader model_path, or set LLM_ARTIFACT_DIR.")
    path = Path(given).expanduser()
    if path.is_dir() or given.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(given))
    except Exception as error:
        raise ModelLoadFailed(f"{given} is not a folder, and the Hub does not have it: {error}") from error


def _formatted(tokenizer: Any, form: str) -> Any:
    """An encode hook that puts every prompt into the model's instruction format."""
    if "{instruction}" not in form:
        raise ModelLoadFailed(f"prompt_fmt {form!r} has no {{instruction}} in it.")

    def encode(text: str, **kwargs: Any) -> Any:
        return tokenizer(form.replace("{instruction}", text), **kwargs)

    return encode
