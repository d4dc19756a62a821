"""The fingerprint of a loaded model: which weights answer, and how they are served."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deployments.config.model import ModelEntry
from deployments.core.fingerprint import combined, fingerprint
from deployments.core.installed import DISTRIBUTION, installed_version
from deployments.registry.digest import file_digests, files_digest, json_digest, loader_source, weights_arguments
from deployments.registry.files import folder_files, model_files, without_paths
from deployments.registry.version import Version
from model_loaders.contract import ModelInfo

_PACKAGES = (DISTRIBUTION, "torch", "transformers", "tokenizers", "peft")
_SAMPLE = 4096
_SECRET = re.compile(r"token$|key$|secret|password|credential", re.IGNORECASE)
_HIDDEN = "(hidden)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFingerprint:
    """A fingerprint, and what it is made of.

    Attributes:
        name: `troupe-w<12>-s<12>`.
        weights, setup: JSON values; `digest` begins with the 12 digits of the name.
    """

    name: str = ""
    weights: Mapping[str, Any] = field(default_factory=dict)
    setup: Mapping[str, Any] = field(default_factory=dict)


def model_fingerprint(entry: ModelEntry, version: Version, info: ModelInfo) -> ModelFingerprint:
    """The fingerprint of a model of an entry. Blocks: files that have not been read are.

    Args:
        version: of the files that it was loaded from.
    """
    weights, setup = _weights(entry, info), _setup(entry, info)
    if version.digest and weights["digest"] != version.digest:  # Its files have been rewritten since.
        weights = {"digest": version.digest, "of": "files"}
    digest = json_digest(setup)
    return ModelFingerprint(
        name=fingerprint(weights["digest"], digest), weights=weights, setup={"digest": digest, **_shown(setup)}
    )


def adapter_fingerprint(base: ModelFingerprint, entry: ModelEntry, version: Version) -> ModelFingerprint:
    """The fingerprint of an adapter over a base.

    Args:
        version: of the adapter's files.
    """
    served = {"api": asdict(entry.api), "dtype": entry.adapters.dtype}
    own = json_digest([version.digest, *served.values()])
    weights, setup = combined(base.name, version.digest, own)
    return ModelFingerprint(
        name=fingerprint(weights, setup),
        weights={"digest": weights, "of": "adapter", "adapter": version.digest, "base": base.weights},
        setup={"digest": setup, "adapter": served, "base": base.setup},
    )


def _weights(entry: ModelEntry, info: ModelInfo) -> dict[str, Any]:
    """The digest of a model's files: those that its loader's arguments name, also in the Hub's cache, or of the folder
    that the model says it comes from; else of samples of its tensors.
    """
    files = model_files(entry.kwargs, hub=True)
    if not files and (folder := _folder(info.model)) is not None:
        files = folder_files(folder)
    if not files:
        return {"digest": json_digest([_tensors(info.model), _text_side(info)]), "of": "tensors"}
    return {
        "digest": files_digest(files, entry.kwargs),
        "of": "files",
        "files": dict(file_digests(files)),
        "arguments": weights_arguments(entry.kwargs),
    }


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
    except (RuntimeError, NotImplementedError, TypeError):  # It has no data, or is a subclass with parts of its own.
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
        "loader": [entry.loader.rpartition(":")[2], loader_source(entry.loader)],
        "kwargs": without_paths(entry.kwargs),
        "engine": asdict(entry.engine),
        "api": asdict(entry.api),
        "dtype": str(getattr(info.model, "dtype", None)),
        "device": _device(info.model),
        "packages": {name: installed_version(name) for name in _PACKAGES},
    }


def _shown(setup: Mapping[str, Any]) -> dict[str, Any]:
    """The setup as JSON values for clients, without what may be a secret."""
    function, source = setup["loader"]
    kwargs = {key: _HIDDEN if _SECRET.search(key) else value for key, value in setup["kwargs"].items()}
    plain = {**setup, "loader": {"function": function, "source": source}, "kwargs": kwargs}
    return dict(json.loads(json.dumps(plain, default=str)))


def _device(model: Any) -> str:
    """The kind of the device that computes: processors of other kinds round differently."""
    kind = str(getattr(model, "device", "cpu")).partition(":")[0]
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{kind} {torch.backends.cpu.get_cpu_capability()}"
