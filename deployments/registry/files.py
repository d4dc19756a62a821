"""The files that a model is loaded from: those of the folders that its loader's arguments name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.config.model import ModelEntry
from model_loaders.local_folder import found, is_model_key

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".npz", ".h5", ".msgpack"})
_SETTINGS = frozenset(
    {".json", ".jinja", ".jinja2", ".txt", ".model", ".tiktoken", ".vocab", ".spm", ".py", ".yaml", ".yml", ".toml"}
)
# What a training run keeps beside the weights for itself.
_TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state)[\w.-]*\.(bin|pt|pth|json|safetensors)"
    r"|([\w.-]*[_-])?(metrics|logs?|history|progress|status|summary|results|stats)\.(json|txt|ya?ml)"
)
_OTHER_FOLDERS = re.compile(
    r"(checkpoint|global_step|step|epoch)[-_]?\d+|\..*|__pycache__|tmp-.*|.*\.tmp|runs|logs|wandb|tensorboard"
)
_DEPTH = 3


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file that a model is loaded from.

    Attributes:
        name: its path below its folder, after the name of the loader's argument if several name one.
        path: where it lies.
    """

    name: str
    path: Path

    @property
    def has_weights(self) -> bool:
        return self.path.suffix in WEIGHTS


def model_files(kwargs: Mapping[str, Any], *, hub: bool = False, base: Path = Path()) -> list[ModelFile]:
    """The files that a loader's arguments name, and those of folders that they name, by name.

    Weights and settings, three folders deep; not the state of a training run, other checkpoints, hidden files and logs.

    Args:
        kwargs: arguments of a loader.
        hub: also the files of models of the Hub that lie in its cache, which never change.
        base: the folder that relative paths start from.
    """
    named = dict(_named(kwargs, hub, base))
    return sorted(
        (
            ModelFile(f"{key}/{name}" if len(named) > 1 else name, path)
            for key, root in named.items()
            for name, path in _below(root)
        ),
        key=lambda file: file.name,
    )


def entry_files(entry: ModelEntry, *, hub: bool = False, base: Path = Path()) -> list[ModelFile]:
    """The files of a model, see `model_files`, or of an adapter without its base."""
    if entry.adapter is not None:
        return folder_files(found(entry.adapter, base))
    return model_files(entry.kwargs, hub=hub, base=base)


def without_paths(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that say where files of this machine lie."""
    named = {key for key, _ in _named(kwargs, False, Path())}
    return {key: value for key, value in kwargs.items() if key not in named}


def folder_files(folder: Path) -> list[ModelFile]:
    """The files of a model's folder, by name."""
    return sorted((ModelFile(name, path) for name, path in _below(folder)), key=lambda file: file.name)


def _named(kwargs: Mapping[str, Any], hub: bool, base: Path) -> Iterator[tuple[str, Path]]:
    """The arguments that name files, and where those lie."""
    for key, value in kwargs.items():
        if not isinstance(value, str | Path) or not 0 < len(str(value)) < 4096 or "\n" in str(value):
            continue
        path = found(str(value), base)
        # A text of any kind: os.path has an answer for each, pathlib raises for those that no path can be.
        if os.path.isfile(path) or (os.path.isdir(path) and (is_model_key(key) or _is_model(path))):
            yield key, path
        elif hub and is_model_key(key) and (snapshot := _cached(str(value), kwargs.get("revision"))) is not None:
            yield key, snapshot


def _is_model(folder: Path) -> bool:
    """Whether a folder that an argument of any name leads to has a model."""
    return any(name == "config.json" or os.path.splitext(name)[1] in WEIGHTS for name in os.listdir(folder))


def _cached(name: str, revision: Any) -> Path | None:
    """The folder of a model in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None


def _below(root: Path, prefix: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Path]]:
    if root.is_file():
        if _counts(root.name):
            yield root.name, root
        return
    try:
        with os.scandir(root) as found_here:
            entries = list(found_here)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir():
            if depth > 1 and not _OTHER_FOLDERS.fullmatch(entry.name):
                yield from _below(Path(entry.path), f"{prefix}{entry.name}/", depth - 1)
        elif _counts(entry.name):
            yield prefix + entry.name, Path(entry.path)


def _counts(name: str) -> bool:
    return (
        not name.startswith(".")
        and os.path.splitext(name)[1] in WEIGHTS | _SETTINGS
        and _TRAINING.fullmatch(name) is None
    )
