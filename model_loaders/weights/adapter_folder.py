"""Folders with a PEFT adapter (https://huggingface.co/docs/peft): beside the weights of a model, or alone.

If peft is installed, transformers applies an adapter in the folder of the weights; otherwise the same folder gives the
base model. The loader's kwargs select one of the two.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from deployments.core.errors import ModelLoadFailed

logger = logging.getLogger("troupe.loader")

FILE = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter beside the weights of its model.

    Attributes:
        name: Hub id or folder of both.
        revision: of the Hub repository.
    """

    name: str
    revision: str | None

    @property
    def skipped(self) -> dict[str, Any]:
        """`adapter_kwargs` of `from_pretrained` with which it finds no adapter."""
        return {"subfolder": "no adapter is looked for"}


def find_adapter(name: str, revision: str | None, asked: str | None) -> Adapter | None:
    """The adapter of a folder or repository that also has weights; None if there is no adapter.

    Args:
        asked: "use", "ignore", or None if nobody has said.

    Raises:
        ModelLoadFailed: the folder has an adapter alone, nobody has said whether to use it, or there is no adapter or
            no peft to use it with.
    """
    file = folder_file(name, FILE, revision)
    if file is None:
        if asked == "use":
            raise ModelLoadFailed(f"adapter is use, but {name} has no {FILE}; leave adapter out.")
        return None
    if not _has_weights(name, revision):
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ModelLoadFailed(
            f"{name} is a PEFT adapter without a model. Its base model is {base!r} (base_model_name_or_path): serve "
            "that one, and the adapter over it with the keys base and adapter, or merge the two (peft's "
            "merge_and_unload) and serve the merged folder."
        )
    if asked is None:
        raise ModelLoadFailed(
            f"{name} has weights and a PEFT adapter ({FILE}). Say which model you mean: kwargs: {{adapter: use}} "
            "applies the adapter (needs the peft package), kwargs: {adapter: ignore} serves the weights as they are."
        )
    if asked == "use" and importlib.util.find_spec("peft") is None:
        raise ModelLoadFailed("adapter is use, which needs the peft package: pip install peft.")
    return Adapter(name=name, revision=revision)


def use_adapter(model: Any, adapter: Adapter) -> Any:
    """The model with an adapter applied.

    Raises:
        ModelLoadFailed: weights of the adapter are missing, or transformers skips them.
    """
    kwargs = {} if adapter.revision is None else {"adapter_kwargs": {"revision": adapter.revision}}
    found = model.load_adapter(adapter.name, **kwargs)
    missing = sorted(getattr(found, "missing_keys", ()) or ())
    if missing:
        raise ModelLoadFailed(
            f"transformers has not loaded {len(missing)} weights of the adapter in {adapter.name}, the first "
            f"{missing[0]}. Either the adapter lacks them, or transformers does not read its kind, such as DoRA. Serve "
            "the model with adapter: ignore, and the adapter over it as an entry with the keys base and adapter."
        )
    return model


def note_adapter(model: Any) -> None:
    """Log whether the adapter in a model's local folder was applied, for any loader."""
    name = getattr(model, "name_or_path", None)
    if isinstance(name, str) and name and (Path(name) / FILE).is_file():
        applied = "with" if getattr(model, "_hf_peft_config_loaded", False) else "without"
        logger.warning("%s has a PEFT adapter (%s): the model is served %s it.", name, FILE, applied)


def folder_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a Hub id or local folder; None if it is not there, or cannot be asked for."""
    found = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _has_weights(name: str, revision: str | None) -> bool:
    if folder_file(name, "config.json", revision) is None:
        return False
    folder = Path(name)
    if not folder.is_dir():
        return True
    return any(not file.name.startswith("adapter_") for pattern in _WEIGHTS for file in folder.glob(pattern))
