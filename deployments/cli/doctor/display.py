"""The report on a terminal, step by step, with a sign of life while a step takes long."""

from __future__ import annotations

import asyncio
import contextlib
import os
import textwrap
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import TextIO

from deployments.cli.doctor.finding import NOT_LOADED, Status, Step, exit_status
from deployments.engine.base.hook_watch import position

_COLORS: dict[Status, str] = {"ok": "32", "warning": "33", "error": "31", "skipped": "2"}
_NAME_WIDTH, _WIDTH = 19, 90
FIRST_SIGN_S, NEXT_SIGN_S = 3.0, 10.0
_CLEAR = "\r\x1b[K"


class Display:
    """Prints steps as they are made.

    Args:
        out: where the report goes.
        signs: where the signs of life go.
        loading: name of the thread that calls the loader.

    Attributes:
        step: name of the step that is being made.
    """

    def __init__(self, out: TextIO, signs: TextIO, loading: str) -> None:
        self._out = out
        self._signs = signs
        self._loading = loading
        self._colors = out.isatty() and not os.environ.get("NO_COLOR")
        self.step, self._since = "", 0.0

    def begin(self, name: str) -> None:
        """A step is being made."""
        self.step, self._since = name, time.monotonic()

    def show(self, step: Step) -> None:
        """Print a step that has been made; one that was left out is for the summary."""
        found = step.finding
        if found.status == "skipped" and found.code is None:
            return
        code = "" if found.code is None else f" [{found.code}]"
        details = [*found.details, *([] if found.fix is None else textwrap.wrap(f"fix: {found.fix}", _WIDTH))]
        self._print(found.status, step.name, f"{found.text}{code}", *details)

    def summary(self, steps: Sequence[Step]) -> None:
        """Print which steps were left out and why, the numbers of findings, and the exit status."""
        left_out: dict[str, list[str]] = {}
        for step in steps:
            if step.finding.status == "skipped" and step.finding.code is None and step.finding.text != NOT_LOADED:
                left_out.setdefault(step.finding.text, []).append(step.name)
        for reason, names in left_out.items():
            name = names[0] if len(names) == 1 else f"{len(names)} steps"
            several = ", ".join(names) if len(names) > 1 else ""
            self._print("skipped", name, reason, *textwrap.wrap(several, _WIDTH, break_on_hyphens=False))
        counts = Counter(step.finding.status for step in steps)
        words = ", ".join(f"{counts[status]} {status}" for status in _COLORS if counts[status])
        print(f"\n{len(steps)} steps: {words}. Exit status {exit_status(steps)}.", file=self._out, flush=True)

    def _print(self, status: Status, name: str, text: str, *details: str) -> None:
        self._clear()
        word = f"{status:8}"
        if self._colors:
            word = f"\x1b[{_COLORS[status]}m{word}\x1b[0m"
        lines = [f"{word} {name:{_NAME_WIDTH}} {text}"]
        lines += details
        print(f"\n{' ' * (_NAME_WIDTH + 10)}".join(lines), file=self._out, flush=True)

    @contextlib.asynccontextmanager
    async def signs_of_life(self) -> AsyncIterator[None]:
        """While the block runs: say which step is being made, how long, and where the loader is."""
        task = asyncio.create_task(self._report())
        try:
            yield
        finally:
            task.cancel()
            self._clear()

    async def _report(self) -> None:
        pause = 1.0 if self._signs.isatty() else NEXT_SIGN_S
        while True:
            await asyncio.sleep(FIRST_SIGN_S if time.monotonic() - self._since < FIRST_SIGN_S else pause)
            seconds = time.monotonic() - self._since
            if seconds < FIRST_SIGN_S:
                continue
            begin, end = (_CLEAR, "") if self._signs.isatty() else ("", "\n")
            print(f"{begin}… {self.step}: {seconds:.0f} s{self._place()}", end=end, file=self._signs, flush=True)

    def _place(self) -> str:
        """Where the loader is; the thread that builds the engine only waits for it."""
        if self.step != "loader":
            return ""
        threads = [thread for thread in threading.enumerate() if thread.name == self._loading]
        return f", at {position(threads[-1])}" if threads else ""

    def _clear(self) -> None:
        if self._signs.isatty():
            print(_CLEAR, end="", file=self._signs, flush=True)
