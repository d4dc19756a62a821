"""Models that compute nothing and take their time: what serving does can be seen without a core being busy.

A `paced` model answers a chat with the words of its last message, one token a word, each after `pace` seconds; all rows
advance together, `max_batch_size` at a time. Loads are written down in a folder, so that a test can count them over all
replicas.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.errors import OutOfMemory
from deployments.core.events import Delta, Failed
from deployments.engine.base.protocol import Emit, EngineRequest, EngineStats
from model_loaders.contract import ModelInfo


class PacedEngine:
    """Says `word 0`, `word 1`, … as long as max_tokens lets it, a word every `pace` seconds for every row at once."""

    supports = frozenset(SamplingParams.__dataclass_fields__)
    max_model_len = 10**8

    def __init__(self, options: EngineOptions, pace: float, closes: Path | None) -> None:
        self._pace = pace
        self._closes = closes
        self._max_batch_size = options.max_batch_size
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
            kind="paced", sequences=len(self._rows), waiting=len(self._waiting), generated_tokens=self._generated
        )

    def check(self) -> None: ...

    def close(self, timeout: float = 30.0) -> None:
        with self._changed:
            if self._closes is not None:
                with self._closes.open("a") as closes:
                    closes.write(f"{len(self._rows) + len(self._waiting)}\n")
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
                while self._waiting and len(self._rows) < self._max_batch_size:
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
    device: str, name: str = "paced", log: str | None = None, pace: float = 0.01, seconds: float = 0.0, tag: str = ""
) -> dict[str, Any]:
    """A paced model, whose every word begins with `tag`.

    With a folder `log`: a line there for every load, which takes `seconds`, and one for every close, which says
    how many requests it cut off.
    """
    if log is not None:
        with (Path(log) / f"{name}.loads").open("a") as loads:
            loads.write(f"{os.getpid()}\n")
    time.sleep(seconds)

    closes = None if log is None else Path(log) / f"{name}.closes"
    return {
        "engine": lambda info, options: PacedEngine(options, pace, closes),
        "apply_chat_template": lambda messages, **_: tag + str(messages[-1]["content"]),
        "encode": lambda text, **_: {"input_ids": list(text.encode())},
        "decode": lambda ids, **_: bytes(ids.tolist()).decode(),
    }


def crashes(device: str) -> dict[str, Any]:
    """A loader that takes its whole process with it."""
    os._exit(13)


def model(name: str, log: Path | str | None = None, **fields: Any) -> dict[str, Any]:
    """The configuration of a paced model; `pace`, `seconds` and `tag` go to the loader, the rest to the entry."""
    kwargs: dict[str, Any] = {key: fields.pop(key) for key in ("pace", "seconds", "tag") if key in fields}
    kwargs |= {"name": name, "log": None if log is None else str(log)}
    return {"id": name, "loader": "tests.faults.paced:load_model", "kwargs": kwargs, **fields}


def loads(log: Path, name: str) -> int:
    """How often a model was loaded, on any replica."""
    file = log / f"{name}.loads"
    return len(file.read_text().splitlines()) if file.exists() else 0


def cut_off(log: Path, name: str) -> int:
    """How many requests were running or waiting in a model when it was closed."""
    file = log / f"{name}.closes"
    return sum(map(int, file.read_text().split())) if file.exists() else 0


def mortal(device: str, trigger: str) -> ModelInfo:
    """The demo model, the thread of whose engine ends in the middle of a step once the file `trigger` is there."""
    from model_loaders.demo import load_model as demo

    info = demo(device)

    def end(*_: object) -> None:
        if Path(trigger).exists():
            Path(trigger).unlink()
            raise SystemExit("the file is there")

    info.model.register_forward_pre_hook(end)
    return info
