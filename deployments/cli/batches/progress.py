"""How far a batch is: a bar with rate, time left and errors, or a line from time to time where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Shows progress.

    Attributes:
        show: takes the number of lines that are done, and of those that failed.
    """

    show: Callable[[int, int], None]


@contextlib.contextmanager
def shown_progress(total: int, before: int) -> Iterator[Progress]:
    """Progress on standard error.

    Args:
        total: number of lines.
        before: lines that were done before.
    """
    if not sys.stderr.isatty():
        yield Progress(_Lines(total, before).show)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    began = time.monotonic()
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=before, rate="")

        def show(done: int, failed: int) -> None:
            bar.update(task, completed=done, rate=_rate(done - before, failed, time.monotonic() - began))

        yield Progress(show)


class _Lines:
    def __init__(self, total: int, before: int) -> None:
        self._total = total
        self._before = before
        self._began = self._said = time.monotonic()

    def show(self, done: int, failed: int) -> None:
        now = time.monotonic()
        if now - self._said < _EVERY_S:
            return
        self._said = now
        left = (self._total - done) * (now - self._began) / max(1, done - self._before)
        rate = _rate(done - self._before, failed, now - self._began)
        print(f"{done} of {self._total} lines, {rate}, {left:.0f} s left", file=sys.stderr, flush=True)


def _rate(done: int, failed: int, seconds: float) -> str:
    return f"{done / max(seconds, 1e-3):.1f} lines/s, {failed} errors"
