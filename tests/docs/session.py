"""Runs the code blocks of a page in a folder, as a reader would, and compares what they print with what the page shows.

- A block with a title is saved as that file.
- `bash` and `python` run in the folder; `troupe …` alone in a block may run in this process. If a `text` block follows,
  it is what they print: `…` stands for any text in a line, and a line that is only `…` for any lines.
- `troupe serve …` alone in a block serves until the next one, or until the session ends.
- `http://127.0.0.1:8000` is that server, wherever it listens.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

from tests.docs.pages import ROOT, Block

SHOWN = "http://127.0.0.1:8000"
"""Where the pages' servers are."""

Serve = Callable[[list[str], Path], AbstractContextManager[tuple[str, str | None]]]
"""Serves what the arguments of `troupe serve` name, in a folder; gives the URL, and what the command prints (None if it
is not the command that serves)."""
Command = Callable[[list[str], Path], str]
"""Runs what the arguments of `troupe` name, in a folder; gives what it prints."""


class Session:
    """A reader's shell.

    Args:
        folder: where the reader works.
        serve: runs the page's servers.
        url: of a server that runs already.
        command: runs a block that is one `troupe …`; without it the command itself does.

    Attributes:
        environment: of the commands.
        programs: a folder of commands of the reader's own.
    """

    def __init__(self, folder: Path, serve: Serve, url: str = SHOWN, command: Command | None = None) -> None:
        self.folder = folder
        self.url = url
        self._serve = serve
        self._command = command
        self._running = ExitStack()
        self.programs = _programs(folder)
        self.environment = {**os.environ, "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}"}

    def run(self, block: Block) -> None:
        """Run a block.

        Raises:
            AssertionError: it fails, or it prints something else than the page shows.
        """
        if block.title is not None:
            (self.folder / block.title).write_text(self._here(block.text), encoding="utf-8")
            return
        if block.language == "python":
            printed = self._python(block)
        elif serves(block):
            self.close()
            self.url, banner = self._running.enter_context(self._serve(arguments(block)[1:], self.folder))
            if banner is None:
                return
            printed = banner
        elif self._command is not None and is_one_command(block):
            printed = self._command(arguments(replace(block, text=self._here(block.text))), self.folder)
        else:
            printed = self.bash(block)
        if block.output is not None:
            assert_shown(block, printed.replace(self.url, SHOWN).replace(str(self.folder), "/home/me"))

    def close(self) -> None:
        """Stop the server."""
        self._running.close()

    def _here(self, text: str) -> str:
        return text.replace(SHOWN, self.url).replace("127.0.0.1:8000", self.url.removeprefix("http://"))

    def bash(self, block: Block) -> str:
        """Run a block of commands that end; what they print."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self._here(block.text)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{block}: {done.stdout}"
        return done.stdout

    def _python(self, block: Block) -> str:
        """In this process: importing the clients again for every block takes most of the time."""
        printed = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed):
            exec(compile(self._here(block.text), str(block), "exec"), {"__name__": "__main__"})
        return printed.getvalue()


def serves(block: Block) -> bool:
    """Whether the block starts a server, which runs until it is stopped."""
    first = next((line for line in block.text.splitlines() if not line.startswith("#")), "")
    return block.language == "bash" and first.startswith("troupe serve") and "--print-config" not in first


def is_one_command(block: Block) -> bool:
    """Whether the block is one `troupe …` that needs nothing of a shell but its quotes."""
    commands = _commands(block)
    return len(commands) == 1 and commands[0].startswith("troupe ") and not set(commands[0]) & set("|&;<>$`~")


def arguments(block: Block) -> list[str]:
    """What follows `troupe` in the block's only command."""
    (command,) = _commands(block)
    return shlex.split(command, comments=True)[1:]


def _commands(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def assert_shown(block: Block, printed: str) -> None:
    """Compare what a block prints with what its page shows."""
    assert block.output is not None
    shown = [line.rstrip() for line in block.output.strip("\n").splitlines()]
    found = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines())
    assert re.fullmatch("\n".join(_patterns(shown)).replace(_ANY_LINES + "\n", _ANY_LINES), found), (
        f"{block} prints:\n{found}\n\nthe page shows:\n{block.output}"
    )


_ANY_LINES = r"(?:[^\n]*\n)*?"


def _patterns(shown: list[str]) -> Iterator[str]:
    for number, line in enumerate(shown):
        if line.strip() != "…":
            yield "[^\n]*?".join(re.escape(part) for part in line.split("…"))
        elif number + 1 < len(shown):
            yield _ANY_LINES
        else:
            yield r"(?:[^\n]*\n?)*"


def _programs(folder: Path) -> Path:
    """A folder with the command `troupe` and the interpreter of the tests."""
    programs = folder.parent / f"{folder.name}-bin"
    programs.mkdir(exist_ok=True)
    python = f"PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)}"
    for name, command in (("python", python), ("troupe", f"{python} -m deployments.cli.main")):
        program = programs / name
        program.write_text(f'#!/bin/sh\n{command} "$@"\n')
        program.chmod(0o755)
    return programs
