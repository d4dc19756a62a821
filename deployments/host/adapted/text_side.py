"""The tokenizer and the chat template in an adapter's folder, if they are not its base's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from deployments.adapters.refused import AdapterRefused
from deployments.core.errors import last_line
from deployments.engine.text.stop_tokens import terminator_ids
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_TEMPLATE = "chat_template.jinja"


def adapted_info(base: ModelInfo, folder: Path) -> ModelInfo | None:
    """The base's model with the tokenizer and the template of an adapter; None if these are the base's.

    Raises:
        AdapterRefused: its tokenizer has other tokens than the base's, or cannot be read.
    """
    own = _tokenizer(folder)
    template = _template(folder, own)
    if own is not None:
        _check_tokens(base, own)
    same_end = own is None or getattr(own, "eos_token_id", None) == getattr(base.tokenizer, "eos_token_id", None)
    of_base = base.chat_template or getattr(base.processor or base.tokenizer, "chat_template", None)
    if same_end and template in (None, of_base):
        return None
    changed = {} if own is None or base.processor is not None else {"tokenizer": own}
    info = dataclasses.replace(base, chat_template=template or base.chat_template, **changed)
    info.served_as = base.served_as
    return info


def further_terminators(hooks: Hooks, base: Hooks) -> frozenset[int]:
    """The tokens that end a text of an adapter and not one of its base."""
    return terminator_ids(hooks) - terminator_ids(base)


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER[:-1]):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise AdapterRefused(f"its tokenizer cannot be read: {last_line(error)}.") from error


def _template(folder: Path, tokenizer: Any) -> str | None:
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    found = getattr(tokenizer, "chat_template", None)
    return found if isinstance(found, str) else None


def _check_tokens(base: ModelInfo, own: Any) -> None:
    if base.tokenizer is None or not hasattr(base.tokenizer, "get_vocab"):
        return
    mine, its = own.get_vocab(), base.tokenizer.get_vocab()
    if mine != its:
        differing = sorted(token for token in mine.keys() ^ its.keys()) or sorted(mine)
        raise AdapterRefused(
            f"its tokenizer has other tokens than its base's ({len(mine)} and {len(its)}, such as {differing[0]!r}); "
            "merge it with PEFT (merge_and_unload) and serve the merged folder."
        )
