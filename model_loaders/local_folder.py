"""Names of models that are paths: they are found on this machine, or refused before the Hub is asked."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.core.errors import ModelLoadFailed

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
"""A repository of the Hub: `name` or `owner/name`."""

_KEYS = (
    *("model", "model_name", "model_path", "model_dir", "path", "folder", "checkpoint", "weights"),
    *("tokenizer", "tokenizer_name", "processor_name", "template_from"),
)

_CONFIGS = ("config.json", "adapter_config.json", "modules.json")
"""Each makes a folder a checkpoint: of transformers, of PEFT, of sentence-transformers."""


def check_folders(kwargs: Mapping[str, Any], base: Path = Path()) -> None:
    """Refuse a loader's arguments that are paths of models that do not exist.

    Args:
        base: the folder that relative paths start from.

    Raises:
        ModelLoadFailed: it names the argument, the path, and names like it in the nearest folder that is there.
    """
    for key in _KEYS:
        value = kwargs.get(key)
        if not isinstance(value, str) or not value or "://" in value or found(value, base).exists():
            continue
        if not HUB_ID.fullmatch(value):
            raise ModelLoadFailed(f"{key}: {value}: {missing(value, base)}")
        if is_mistyped(value, base):
            raise ModelLoadFailed(f"{key}: {value}: {missing(value, base)} {hub_instead(value)}")


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that transformers cannot load a model from.

    Raises:
        ModelLoadFailed: it has no config; the message names folders in it that have one.
    """
    if not folder.is_dir() or any((folder / name).exists() for name in _CONFIGS):
        return
    inner = sorted(str(each.parent) for each in folder.glob("*/config.json"))
    hint = f" Did you mean {inner[-1]}?" if inner else " Write one with save_pretrained, or write a loader for it."
    raise ModelLoadFailed(f"{folder} is not a checkpoint of transformers: it has no config.json.{hint}")


def is_mistyped(name: str, base: Path = Path()) -> bool:
    """Whether a name that could be the Hub's is rather a path that leads nowhere: its first part is a folder here, and
    the Hub's cache on this machine does not have it.
    """
    owner, slash, _ = name.partition("/")
    if not slash or not (base / owner).is_dir() or (base / name).exists():
        return False
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    return not (cached.is_dir() and any(cached.iterdir()))


def hub_instead(name: str) -> str:
    """What to do if such a name is meant to be the Hub's."""
    return f"If it is a repository of the Hub, download it first: hf download {name}"


def is_model_key(key: str) -> bool:
    """Whether an argument of this name says which model or tokenizer a loader loads."""
    return key in _KEYS


def found(name: str, base: Path = Path()) -> Path:
    """The folder of a path, which can contain `~` and Windows separators; of any other text one that does not exist."""
    path = base / os.path.expanduser(name)
    return path if os.path.exists(path) or "\\" not in name else base / os.path.expanduser(name.replace("\\", "/"))


def missing(name: str, base: Path = Path()) -> str:
    """A message that says which path does not exist, and what exists."""
    path = found(name, base).absolute()
    there = path.parent
    while not there.is_dir():
        path, there = there, there.parent
    names = sorted(entry.name for entry in there.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=1)
    has = f"it has {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "it is empty"
    return f"there is no {path.name!r} in {there} ({f'did you mean {near[0]!r}?' if near else has})."


def unreadable_weights(kwargs: Mapping[str, Any]) -> str | None:
    """Which file of the folders that a loader's arguments name is not a whole safetensors file, and why."""
    from safetensors import SafetensorError, safe_open

    named = [found(value) for key, value in kwargs.items() if is_model_key(key) and isinstance(value, str)]
    for file in (file for folder in named for file in sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file} is damaged or not written to its end: {error}."
    return None


def local_or_hub(name: str) -> str:
    """The local folder of a name, or the name itself for the Hub.

    Raises:
        ModelLoadFailed: it is a path that leads nowhere.
    """
    check_folders({"model_name": name})
    return str(found(name)) if "~" in name or "\\" in name else name


def nowhere(name: str, why: str) -> ModelLoadFailed:
    """The error for a name that is neither a folder nor known to the Hub."""
    return ModelLoadFailed(f"{name} is not a local folder: {missing(name)} The Hub does not have it either: {why}")
