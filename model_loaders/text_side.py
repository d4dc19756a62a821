"""The processor and tokenizer that belong to a Hub id or folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from deployments.core.errors import ModelLoadFailed

logger = logging.getLogger("troupe.loader")


def load_text_side(name: str, **options: Any) -> tuple[Any, Any]:
    """The processor of a multimodal model, or None, and the tokenizer.

    Args:
        options: of `from_pretrained`, such as `revision`.
    """
    try:
        processor = AutoProcessor.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.info("%s has no processor (%s); using its tokenizer", name, type(error).__name__)
        processor = None
    if processor is not None and hasattr(processor, "tokenizer"):
        return processor, processor.tokenizer
    is_tokenizer = hasattr(processor, "convert_ids_to_tokens")
    return None, processor if is_tokenizer else AutoTokenizer.from_pretrained(name, **options)


def read_template(given: str | None) -> str | None:
    """A chat template, given as text or as the path of a file.

    Raises:
        ModelLoadFailed: there is no such file.
    """
    if given is None or "{" in given or "\n" in given:
        return given
    file = Path(given).expanduser()
    if not file.is_file():
        raise ModelLoadFailed(f"chat_template file {given} does not exist; give a path, or the template itself.")
    return file.read_text(encoding="utf-8")
