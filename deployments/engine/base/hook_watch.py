"""Watches a loader's functions that an engine's thread calls: one that hangs must not let others wait in silence."""

from __future__ import annotations

import functools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.core.errors import ModelError

_OFTEN_S = 1.0


@dataclass(slots=True, eq=False)
class _Call:
    name: str
    began: float
    thread: threading.Thread


class HookWatch:
    """Sees that calls return in time. The calls are those of one thread.

    Args:
        hung: called again and again with the error of a call that has not returned.

    Attributes:
        limit: seconds that a call may take.
    """

    def __init__(self, hung: Callable[[ModelError], None]) -> None:
        self._hung = hung
        self.limit = 60.0
        self._call: _Call | None = None
        self._late: tuple[_Call, ModelError] | None = None
        self._closed = threading.Event()

    def watched(self, hooks: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """The functions, each call of which is watched."""
        if hooks:
            threading.Thread(target=self._look, name="hook-watch", daemon=True).start()
        return {name: self._watched(name, hook) for name, hook in hooks.items()}

    @property
    def error(self) -> ModelError | None:
        """Why nothing is computed now; None if a call is not late."""
        late = self._late
        return late[1] if late is not None and late[0] is self._call else None

    def close(self) -> None:
        """End the watch."""
        self._closed.set()

    def _watched(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def called(*args: Any, **kwargs: Any) -> Any:
            self._call = _Call(name, time.monotonic(), threading.current_thread())
            try:
                return hook(*args, **kwargs)
            finally:
                self._call = None

        return called

    def _look(self) -> None:
        while not self._closed.wait(min(_OFTEN_S, self.limit / 4)):
            call = self._call
            if call is None or time.monotonic() - call.began <= self.limit:
                continue
            place = position(call.thread)
            message = f"Hook {call.name!r} of the loader has not returned for {self.limit:g} s (at {place})."
            self._late = (call, ModelError(message))
            if (error := self.error) is not None:
                self._hung(error)


def position(thread: threading.Thread) -> str:
    """Where a thread is now, as `file.py, line 12 in function`."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return "already ended"
    here = traceback.extract_stack(frame)[-1]
    return f"{Path(here.filename).name}, line {here.lineno} in {here.name}"
