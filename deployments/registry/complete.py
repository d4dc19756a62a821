"""Whether the files of a model are all there, and each to its end: a trainer or a copy may be writing them."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from deployments.registry.files import WEIGHTS, ModelFile

_HEADER = 8
_LARGEST_HEADER = 100_000_000
_SMALL = 2**20
_SETTINGS = re.compile(r"config|token|vocab|processor|adapter|modules")
"""What a name of a JSON file has in it that is read when a model is loaded."""


def incomplete(files: Sequence[ModelFile], marker: str | None = None) -> str | None:
    """What is missing of a model's files, as a sentence that names the file; None if nothing is.

    A safetensors file is complete if it has the length that its header says, a file of torch if it is a whole archive,
    JSON if it ends with a bracket, an index of shards if they are all there. Only the beginnings and ends are read.

    Args:
        marker: name of a file that the writer of the folder writes last.
    """
    try:
        return next((fault for file in files if (fault := _fault(file.path))), None) or _marker_fault(files, marker)
    except FileNotFoundError as error:
        return f"{error.filename} is gone."


def _fault(path: Path) -> str | None:
    if path.name.endswith(".index.json"):
        return _json_fault(path) or _shards_fault(path)
    if path.suffix == ".json":
        return _json_fault(path) if _SETTINGS.search(path.name) else None
    check = _CHECKS.get(path.suffix)
    return None if check is None else check(path)


def _safetensors_fault(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER), "little")
        if size < _HEADER or not 0 < length <= min(_LARGEST_HEADER, size - _HEADER):
            return f"{path} has {size} bytes, less than its header."
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{path} has a header that cannot be read."
    expected = _HEADER + length + max(ends, default=0)
    return None if size == expected else f"{path} has {size} bytes; its header says {expected}."


def _archive_fault(path: Path) -> str | None:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None if path.stat().st_size else f"{path} is empty."
    return None if zipfile.is_zipfile(path) else f"{path} has no end: it is an archive that is cut short."


def _json_fault(path: Path) -> str | None:
    """Small files are read; of large ones, such as a tokenizer's, the end must close something."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _SMALL:
            try:
                json.load(file)
            except ValueError:
                return f"{path} is not complete JSON."
            return None
        file.seek(size - 64)
        return None if file.read().rstrip()[-1:] in (b"}", b"]") else f"{path} is cut short."


def _shards_fault(path: Path) -> str | None:
    try:
        shards = set(json.loads(path.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # Not an index of shards.
    missing = sorted(name for name in shards if not (path.parent / str(name)).exists())
    if len(missing) == len(shards) and any(other.suffix in WEIGHTS for other in path.parent.iterdir()):
        return None  # The index of another format, whose weights were left out.
    return f"{path.parent / missing[0]} is missing; {path.name} lists it." if missing else None


def _marker_fault(files: Sequence[ModelFile], marker: str | None) -> str | None:
    """A marker that is older than what it stands for is that of an earlier checkpoint."""
    if marker is None or not files:
        return None
    folders = {file.path.parent for file in files}
    found = [folder / marker for folder in folders if (folder / marker).exists()]
    if not found:
        return f"There is no {marker} in {os.path.commonpath(folders)} yet."
    newest = max(files, key=lambda file: file.path.stat().st_mtime_ns)
    if max(each.stat().st_mtime_ns for each in found) < newest.path.stat().st_mtime_ns:
        return f"{marker} is older than {newest.path}."
    return None


_CHECKS = {".safetensors": _safetensors_fault, ".bin": _archive_fault, ".pt": _archive_fault, ".pth": _archive_fault}
