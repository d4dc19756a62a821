"""The fingerprint of a loaded model: which weights answer, and how they are served."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deployments.config.model import ModelEntry
from deployments.core.fingerprint import fingerprint
from deployments.core.installed import DISTRIBUTION, installed_version
from deployments.registry.digest import files_digest, json_digest
from deployments.registry.files import folder_files, model_files, without_paths
from deployments.registry.version import Version
from model_loaders.contract import ModelInfo
from model_loaders.loader_name import is_file, parts

_PACKAGES = (DISTRIBUTION, "torch", "transformers", "tokenizers", "peft")
_SAMPLE = 4096


def model_fingerprint(entry: ModelEntry, version: Version, info: ModelInfo) -> str:
    """The fingerprint of a model of an entry. Blocks: files that have not been read are.

    Args:
        version: of the files that it was loaded from.
    """
    return fingerprint(version.digest or _weights(entry, info), json_digest(_setup(entry, info)))


def _weights(entry: ModelEntry, info: ModelInfo) -> str:
    """The digest of a model whose loader names no files of this machine: of those in the Hub's cache, or of the folder
    that the model says it comes from; else of samples of its tensors.
    """
    files = model_files(entry.kwargs, hub=True)
    if not files and (folder := _folder(info.model)) is not None:
        files = folder_files(folder)
    return files_digest(files, entry.kwargs) if files else json_digest([_tensors(info.model), _text_side(info)])


def _folder(model: Any) -> Path | None:
    name = getattr(model, "name_or_path", None)
    return Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None


def _tensors(model: Any) -> list[Any]:
    """Names, shapes and types of a module's tensors, and the digest of the beginning, middle and end of each."""
    if not isinstance(model, torch.nn.Module):
        return []
    return [[name, str(tensor.dtype), [*tensor.shape], _sample(tensor)] for name, tensor in _named_tensors(model)]


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _sample(tensor: Tensor) -> str:
    try:
        flat = tensor.detach().reshape(-1)
        starts = (0, max(0, (flat.numel() - _SAMPLE) // 2), max(0, flat.numel() - _SAMPLE))
        pieces = [flat[start : start + _SAMPLE].cpu().contiguous().view(torch.uint8) for start in starts]
        return hashlib.sha256(b"".join(piece.numpy().tobytes() for piece in pieces)).hexdigest()
    except (
        RuntimeError,
        NotImplementedError,
        TypeError,
    ):  # It has no data, or is a subclass with parts of its own.
        return ""


def _text_side(info: ModelInfo) -> list[Any]:
    tokenizer = info.tokenizer
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if hasattr(backend, "to_str") else _vocabulary(tokenizer)
    return [text, info.chat_template or getattr(tokenizer, "chat_template", None)]


def _vocabulary(tokenizer: Any) -> Any:
    try:
        return sorted(tokenizer.get_vocab().items())
    except (AttributeError, NotImplementedError):
        return None


def _setup(entry: ModelEntry, info: ModelInfo) -> dict[str, Any]:
    return {
        "loader": [entry.loader.rpartition(":")[2], _source(entry.loader)],
        "kwargs": without_paths(entry.kwargs),
        "engine": asdict(entry.engine),
        "api": asdict(entry.api),
        "dtype": str(getattr(info.model, "dtype", None)),
        "device": _device(info.model),
        "packages": {name: installed_version(name) for name in _PACKAGES},
    }


def _source(loader: str) -> str | None:
    """The digest of the file that a loader's function is in."""
    place, _ = parts(loader)
    if not is_file(place):
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            return None
        place = (spec and spec.origin) or ""
    file = Path(place).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _device(model: Any) -> str:
    """The kind of the device that computes: processors of other kinds round differently."""
    kind = str(getattr(model, "device", "cpu")).partition(":")[0]
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{kind} {torch.backends.cpu.get_cpu_capability()}"
