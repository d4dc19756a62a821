"""Reports of transformers about the checkpoints that a loader reads: weights that are missing, and therefore random."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterator

logger = logging.getLogger("troupe.loader")

# The logger of `from_pretrained`, and a row of its table: the key, its status.
_SOURCE = "transformers.modeling_utils"
_ROW = re.compile(r"^(\S.*?)\s*\|\s*(MISSING|MISMATCH|UNEXPECTED)\b", re.MULTILINE)
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_MEANING = {
    "MISSING": "missing from the checkpoint, so random",
    "MISMATCH": "of another size in the checkpoint, so random",
    "UNEXPECTED": "in the checkpoint, but not in the model",
}
_SHOWN = 5


class _Listener(logging.Handler):
    """Collects the load reports of one thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread_id = threading.get_ident()
        self.reports: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if threading.get_ident() == self.thread_id and "LOAD REPORT" in (text := record.getMessage()):
            self.reports.append(_COLORS.sub("", text))


_listeners: list[_Listener] = []


@contextlib.contextmanager
def reported(loader: str) -> Iterator[None]:
    """Log the reports of transformers while a loader runs in this thread.

    Args:
        loader: its name as configured.
    """
    listener, source = _Listener(), logging.getLogger(_SOURCE)
    _listeners.append(listener)
    source.addHandler(listener)
    try:
        yield
    finally:
        source.removeHandler(listener)
        _listeners.remove(listener)
    for report in listener.reports:
        for status, meaning in _MEANING.items():
            keys = [key for key, found in _ROW.findall(report) if found == status]
            if keys:
                more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
                logger.warning("Loader %s: weights %s: %s%s.", loader, meaning, ", ".join(keys[:_SHOWN]), more)


def forget_reports() -> None:
    """Drop what was reported in this thread: it was dealt with."""
    for listener in _listeners:
        if listener.thread_id == threading.get_ident():
            listener.reports.clear()
