"""Batches as a client makes them, with the official client."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from openai import OpenAI
from openai.types import Batch

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def request(custom_id: str, text: str, model: str = "org/scripted", **body: Any) -> dict[str, Any]:
    """A line with a chat."""
    message = {"role": "user", "content": text}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": CHAT,
        "body": {"model": model, "messages": [message], **body},
    }


def jsonl(lines: Sequence[Mapping[str, Any] | str]) -> bytes:
    """Lines as the content of a file; a text stays as it is."""
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()


def create(client: OpenAI, lines: Sequence[Mapping[str, Any] | str], endpoint: Any = CHAT, **fields: Any) -> Batch:
    """A new batch."""
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    fields = {"completion_window": "24h", **fields}
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, **fields)


def ended(client: OpenAI, batch_id: str, seconds: float = 60) -> Batch:
    """A batch after its end."""
    return until(client, batch_id, lambda batch: batch.status in ENDED, seconds)


def until(client: OpenAI, batch_id: str, true: Any, seconds: float = 60) -> Batch:
    """A batch as soon as something is true of it."""
    end = time.monotonic() + seconds
    while not true(batch := client.batches.retrieve(batch_id)):
        assert time.monotonic() < end, batch
        time.sleep(0.02)
    return batch


def results(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of a file with results, by custom_id, each once."""
    lines = [] if file_id is None else list(map(json.loads, client.files.content(file_id).text.splitlines()))
    found = {str(line["custom_id"]): line for line in lines}
    assert len(found) == len(lines)
    return found
