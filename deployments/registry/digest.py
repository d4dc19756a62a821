"""Digests of a model's files: their content alone, so that they are equal on every machine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deployments.registry.files import ModelFile
from model_loaders.loader_name import is_file, parts

_BLOB = re.compile(r"/models--[^/]+/blobs/([0-9a-f]{64})$")
_OF_THE_MODEL = ("chat_template", "adapter")
_REMEMBERED = 10_000
_BLOCK = 4 * 2**20
_known: dict[tuple[int, int, int, int, int], str] = {}
_lock = threading.Lock()


def files_digest(files: Sequence[ModelFile], kwargs: Mapping[str, Any]) -> str:
    """The SHA-256, in hex, of the names and contents of files. Blocks: it reads them, several at once.

    Args:
        kwargs: arguments of the loader, two of which make the model another: a chat template, and what to do with an
            adapter that lies beside the weights.

    Raises:
        OSError: a file cannot be read.
    """
    return json_digest([[[name, digest] for name, digest in file_digests(files)], weights_arguments(kwargs)])


def file_digests(files: Sequence[ModelFile]) -> list[tuple[str, str]]:
    """The name of each file and the SHA-256 of its content. Blocks: it reads them, several at once.

    Raises:
        OSError: a file cannot be read.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "digest") as pool:
        digests = pool.map(_file_digest, [file.path for file in files])
        return list(zip([file.name for file in files], digests, strict=True))


def weights_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a loader that make its model another."""
    return {key: kwargs[key] for key in _OF_THE_MODEL if kwargs.get(key) is not None}


def json_digest(value: Any) -> str:
    """The SHA-256, in hex, of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    """Of a file's content. A blob of the Hub's cache has it for a name; others are remembered until they change."""
    blob = _BLOB.search(os.path.realpath(path))
    if blob is not None:
        return blob[1]
    with path.open("rb", buffering=0) as file:
        found = os.fstat(file.fileno())
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        with _lock:
            if key in _known:
                return _known[key]
        digest, block = hashlib.sha256(), bytearray(min(_BLOCK, found.st_size + 1))
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    # A write so soon after the last may leave the times as they are.
    if time.time() - max(found.st_mtime, found.st_ctime) > 1:
        with _lock:
            if len(_known) >= _REMEMBERED:
                _known.clear()
            _known[key] = digest.hexdigest()
    return digest.hexdigest()


def loader_source(loader: str) -> str | None:
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
