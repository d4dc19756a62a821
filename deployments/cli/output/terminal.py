"""What the user sees of a server: our lines alone. All else that its process and Ray print goes to a file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class Stage:
    """A stage of the start.

    Attributes:
        result: what the line at its end says.
        show: shows how much of it is done, 0 to 1.
    """

    def __init__(self) -> None:
        self.result = ""
        self.show: Callable[[float], None] = lambda _: None


class Terminal:
    """The standard output and error that the process has begun with.

    Attributes:
        redirected: whether those of the process are a file now.
    """

    def __init__(self) -> None:
        self.redirected = False
        self._out = os.fdopen(os.dup(1), "w", buffering=1, errors="replace")
        self._error = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")

    def redirect(self, file: Path) -> None:
        """From now on standard output and error of the process are a file, also for what C++ prints."""
        log = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        self.redirected = True

    def say(self, text: str) -> None:
        """Print lines to standard output; do nothing if the terminal was closed."""
        with contextlib.suppress(OSError):
            print(text, file=self._out, flush=True)

    def complain(self, text: str) -> None:
        """Print a message to standard error."""
        with contextlib.suppress(OSError):
            print(f"troupe: {text}", file=self._error, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A stage of the start: a line when it has ended, and until then its state if this is a terminal."""
        stage, began = Stage(), time.monotonic()
        if not self._out.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
            yield stage
        else:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            # It would take what the process prints, and show it above the bar.
            plain = Progress(
                *columns, console=Console(file=self._out), transient=True, redirect_stdout=False, redirect_stderr=False
            )
            with plain as progress:
                task = progress.add_task(f"{name:13}", total=None)
                stage.show = lambda part: progress.update(task, total=1.0 if part else None, completed=part)
                yield stage
        self.say(f"{name:13}{stage.result} ({time.monotonic() - began:.1f} s)")
