"""The processor and tokenizer that belong to a Hub id or folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from deployments.core.errors import ModelLoadFailed
from model_loaders.weights.adapter_folder import folder_file

logger = logging.getLogger("troupe.loader")

_OF_TOKENIZER = re.compile(r"token|vocab|merges|spiece|\.spm$|\.tiktoken$|\.bpe\b|tekken")
"""What a name of a tokenizer's file has in it."""

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def load_text_side(name: str, **options: Any) -> tuple[Any, Any]:
    """The processor of a multimodal model, or None, and the tokenizer.

    Args:
        options: of `from_pretrained`, such as `revision`.

    Raises:
        ModelLoadFailed: the folder has no file of a tokenizer.
    """
    try:
        processor = AutoProcessor.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if any(folder_file(name, file, options.get("revision")) for file in _PROCESSOR_FILES):
            logger.warning("%s is served with its tokenizer, without its processor: %s", name, _in_a_line(error))
        processor = None
    if processor is not None and hasattr(processor, "tokenizer"):
        return processor, processor.tokenizer
    is_tokenizer = hasattr(processor, "convert_ids_to_tokens")
    tokenizer = processor if is_tokenizer else _tokenizer(name, **options)
    if not options.get("trust_remote_code") and "auto_map" in getattr(tokenizer, "init_kwargs", ()):
        logger.warning("%s has code of its own for its tokenizer, which is not run: set trust_remote_code: true.", name)
    return None, tokenizer


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _tokenizer(name: str, **options: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        folder = Path(name)
        if not folder.is_dir() or any(_OF_TOKENIZER.search(file.name) for file in folder.iterdir()):
            raise
        raise ModelLoadFailed(
            f"{name} has no tokenizer. Save it there with tokenizer.save_pretrained, or name the folder or the "
            "repository of one as tokenizer_name."
        ) from error


def read_template(given: str | None) -> str | None:
    """A chat template, given as text or as the path of a file.

    Raises:
        ModelLoadFailed: there is no such file, or it is not a text.
    """
    if given is None or "{" in given or "\n" in given:
        return given
    file = Path(given).expanduser()
    if not file.is_file():
        raise ModelLoadFailed(f"chat_template file {given} does not exist; give a path, or the template itself.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelLoadFailed(f"chat_template file {given} is not a text in UTF-8; save it as UTF-8.") from error
