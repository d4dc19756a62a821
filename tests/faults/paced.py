"""Models that compute nothing and take their time: what serving does can be seen without a core being busy.

A `paced` model answers a chat with the words of its last message, one token a word, each after `pace` seconds; all rows
advance together, `max_rows` at a time. Loads are written down in a folder, so that a test can count them over all
replicas.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from deployments.engine.options import EngineOptions
from deployments.engine.protocol import Emit, EngineRequest, EngineStats
from deployments.errors import OutOfMemory
from deployments.messages import Delta, Failed, SamplingParams
from model_loaders.contract import ModelInfo


class PacedEngine:
    """Says `word 0`, `word 1`, … as long as max_tokens lets it, a word every `pace` seconds for every row at once."""

    supports = frozenset(SamplingParams.__dataclass_fields__)
    max_model_len = 10**8

    def __init__(self, info: ModelInfo, options: EngineOptions, pace: float) -> None:
        self._pace = pace
        self._max_rows = options.max_rows
        self._changed = threading.Condition()
        self._rows: dict[str, tuple[EngineRequest, Emit, int]] = {}
        self._waiting: dict[str, tuple[EngineRequest, Emit, int]] = {}
        self._generated = 0
        self._closing = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        with self._changed:
            self._waiting[request.request_id] = (request, emit, 0)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self._waiting.pop(request_id, None)
            self._rows.pop(request_id, None)

    def stats(self) -> EngineStats:
        return EngineStats(
            kind="paced", rows=len(self._rows), waiting=len(self._waiting), generated_tokens=self._generated
        )

    def check(self) -> None: ...

    def close(self, timeout: float = 30.0) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._rows or self._waiting or self._closing):
                    self._changed.wait()
                if self._closing and not self._rows:
                    return
                while self._waiting and len(self._rows) < self._max_rows:
                    key = next(iter(self._waiting))
                    self._rows[key] = self._waiting.pop(key)
            time.sleep(self._pace)
            with self._changed:
                for key, (request, emit, said) in list(self._rows.items()):
                    self._step(key, request, emit, said)

    def _step(self, key: str, request: EngineRequest, emit: Emit, said: int) -> None:
        text = bytes(request.input_ids).decode()
        if "[oom]" in text:
            del self._rows[key]
            emit(Failed(OutOfMemory("The device ran out of memory for this request.", retry_after=1)))
            return
        self._generated += 1
        last = said + 1 >= (request.sampling.max_tokens or 1)
        emit(Delta(text=f"{text} {said} ", token_ids=(said,), finish_reason="length" if last else None))
        if last:
            del self._rows[key]
        else:
            self._rows[key] = (request, emit, said + 1)


def load_model(
    device: str, name: str = "paced", log: str | None = None, pace: float = 0.01, seconds: float = 0.0
) -> dict[str, Any]:
    """A paced model; a line in the folder `log` for every load, which takes so many `seconds`."""
    if log is not None:
        with (Path(log) / f"{name}.loads").open("a") as loads:
            loads.write(f"{os.getpid()}\n")
    time.sleep(seconds)

    def closed() -> None:
        if log is not None:
            with (Path(log) / f"{name}.closes").open("a") as closes:
                closes.write(f"{os.getpid()}\n")

    return {
        "engine": lambda info, options: PacedEngine(info, options, pace),
        "apply_chat_template": lambda messages, **_: str(messages[-1]["content"]),
        "encode": lambda text, **_: {"input_ids": list(text.encode())},
        "decode": lambda ids, **_: bytes(ids.tolist()).decode(),
        "close": closed,
    }


def crashes(device: str) -> dict[str, Any]:
    """A loader that takes its whole process with it."""
    os._exit(13)


def model(name: str, log: Path | str | None = None, **fields: Any) -> dict[str, Any]:
    """The configuration of a paced model; `pace` and `seconds` go to the loader, the rest to the entry."""
    kwargs = {key: fields.pop(key) for key in ("pace", "seconds") if key in fields}
    kwargs |= {"name": name, "log": None if log is None else str(log)}
    return {"id": name, "loader": "tests.faults.paced:load_model", "kwargs": kwargs, **fields}


def loads(log: Path, name: str) -> int:
    """How often a model was loaded, on any replica."""
    file = log / f"{name}.loads"
    return len(file.read_text().splitlines()) if file.exists() else 0
