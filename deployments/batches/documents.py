"""Batch objects as OpenAI describes them, and their way from one status to the next."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from deployments.batches.client import NewFile
from deployments.batches.database import Document
from deployments.batches.files import file_object, new_file_id
from deployments.batches.lines import ENDPOINTS
from deployments.core.errors import BadRequest

_WINDOW = re.compile(r"([1-9]\d{0,5})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_S = 30 * 86400
ENDED = ("completed", "failed", "expired", "cancelled")
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
_PRIVATE = "troupe"
"""Key of what is not for clients: ids of the files with results, and seconds until these are deleted."""


def new_batch(fields: Mapping[str, Any]) -> Document:
    """The batch that a request describes.

    Raises:
        BadRequest: a field cannot be used.
    """
    endpoint = fields["endpoint"]
    if endpoint not in ENDPOINTS:
        raise BadRequest(
            f"Invalid 'endpoint' {str(endpoint)[:100]!r}: there are {', '.join(ENDPOINTS)}.", param="endpoint"
        )
    now, key = int(time.time()), uuid4().hex
    return {
        "id": f"batch_{key}",
        "object": "batch",
        "endpoint": endpoint,
        "errors": None,
        "input_file_id": fields["input_file_id"],
        "completion_window": fields["completion_window"],
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + _window(fields["completion_window"]),
        **{f"{name}_at": None for name in _TIMES},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": fields.get("metadata"),
        _PRIVATE: {"output": new_file_id(), "error": new_file_id(), "keep_s": fields.get("output_expires_after")},
    }


def _window(text: str) -> int:
    match = _WINDOW.fullmatch(text)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < seconds <= _LONGEST_S:
        raise BadRequest(
            f"Invalid 'completion_window' {text[:100]!r}: input should be a time such as 24h, 90m or 7d, at most 30d.",
            param="completion_window",
        )
    return seconds


def public(document: Document) -> Document:
    """What clients see."""
    return {key: value for key, value in document.items() if key != _PRIVATE}


def key_of(document: Document) -> str:
    """The hex digits of a batch's id."""
    return str(document["id"]).removeprefix("batch_")


def set_status(document: Document, status: str) -> None:
    """Change the status, and note when."""
    document["status"] = status
    document[f"{status}_at"] = int(time.time())


def set_errors(document: Document, errors: list[dict[str, Any]]) -> None:
    """Change what the batch says of failures; each has `code` and `message`."""
    data = [{"param": None, "line": None, **error} for error in errors]
    document["errors"] = {"object": "list", "data": data} if data else None


def result_ids(document: Document) -> tuple[str, str]:
    """Ids of the files with answers and with errors, which clients see when the batch has ended."""
    return document[_PRIVATE]["output"], document[_PRIVATE]["error"]


def files_in_use(document: Document) -> set[str]:
    """Ids of the files that a batch reads or writes."""
    return set() if document["status"] in ENDED else {document["input_file_id"], *result_ids(document)}


def result_object(document: Document, which: str, size: int) -> Document:
    """The file object of the answers or of the errors.

    Args:
        which: output or error.
    """
    name = f"{document['id']}_{which}.jsonl"
    new = NewFile(filename=name, purpose="batch_output", expires_after=document[_PRIVATE]["keep_s"])
    return file_object(document[_PRIVATE][which], size, new)
