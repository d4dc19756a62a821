"""Chat templates of requests, rendered in processes that can be killed (`model_loaders.prompts.request_template`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from deployments.core import errors
from deployments.core.calls import ChatPrompt
from deployments.core.errors import ModelError, TemplateFailed, TroupeError, Unavailable
from deployments.host.worker import Workers
from model_loaders.contract import ModelInfo
from model_loaders.prompts.request_template import HEADER, MEMORY, WALL_FACTOR, RenderRequest

T = TypeVar("T")

logger = logging.getLogger("troupe.host")

_PROCESSES = 2
_START_LIMIT_S = 120.0
_GRACE_S = 5.0
# What the processes get of the environment. No keys and tokens, and nothing of Ray.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ")


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one rendering may take.

    Attributes:
        seconds: of processor time; `WALL_FACTOR` times as many by the clock.
        memory: bytes of address space beyond what the process has when it starts.
        text: bytes of the prompt.
    """

    seconds: float = 5.0
    memory: int = 256 * 2**20
    text: int = 64 * 2**20


class _Ended(Exception):
    """The process has ended; `status` is its exit status, negative for a signal."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Process:
    """One process. It renders one conversation at a time."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None

    def render(self, request: bytes, limits: RenderLimits) -> tuple[dict[str, Any], bytes]:
        """The process's answer and the text.

        Raises:
            _Ended: it has ended instead.
            Unavailable: it does not start.
        """
        popen = self.start()
        assert popen.stdin is not None
        with self._killed_after(popen, limits.seconds * WALL_FACTOR + _GRACE_S):
            with contextlib.suppress(BrokenPipeError):
                popen.stdin.write(HEADER.pack(len(request), limits.seconds, limits.memory) + request)
                popen.stdin.flush()
            answer, text = self._answer(popen)
        if answer["last"]:
            self.stop()
        return answer, text

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process unless it runs, and wait until it is ready."""
        if self._popen is not None and self.is_running:
            return self._popen
        self.stop()
        # Its errors do not go where this process's own go: to Ray's log, or to a pipe that somebody reads to its end.
        with tempfile.TemporaryFile() as written:
            self._popen = popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "model_loaders.prompts.request_template", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                env=_environment(),
                start_new_session=True,
            )
            try:
                with self._killed_after(popen, _START_LIMIT_S):
                    self._answer(popen)
            except _Ended as ended:
                written.seek(0)
                logger.error("no process for chat templates: %s", written.read().decode(errors="replace"))
                raise Unavailable(
                    f"The process that renders chat templates of requests does not start (status {ended.status})."
                ) from None
        return popen

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self._popen is not None and self._popen.poll() is None

    def stop(self) -> None:
        """Kill the process if there is one."""
        popen, self._popen = self._popen, None
        if popen is None:
            return
        popen.kill()
        popen.wait()
        for pipe in (popen.stdin, popen.stdout):
            with contextlib.suppress(OSError):
                _opened(pipe).close()

    def _answer(self, popen: subprocess.Popen[bytes]) -> tuple[dict[str, Any], bytes]:
        answers = _opened(popen.stdout)
        line = answers.readline()
        answer = json.loads(line) if line.endswith(b"\n") else {"bytes": 1}
        text = answers.read(answer["bytes"])
        if len(text) < answer["bytes"]:
            raise _Ended(popen.wait())
        return answer, text

    @contextlib.contextmanager
    def _killed_after(self, popen: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
        """Kill the process if this takes longer: it would else end itself, but may have been stopped."""
        timer = threading.Timer(seconds, popen.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class TemplateProcesses:
    """Processes that render chat templates of requests. They start when they are first needed, and end with this one.

    Args:
        limits: of each rendering.
    """

    def __init__(self, limits: RenderLimits | None = None) -> None:
        self._limits = limits or RenderLimits()
        self._processes = [_Process() for _ in range(_PROCESSES)]
        # The kernel ends a process with the thread that has started it, and these threads last.
        self._workers = Workers("templates", _PROCESSES)
        # Those that run are at the right end. There is one for each thread.
        self._idle = deque(self._processes)
        self._end = weakref.finalize(self, _end, self._workers, self._processes)

    def warm(self) -> None:
        """Start a process now, so that the next request does not wait for it."""
        self._workers.submit(lambda: self._with_process(self._idle.popleft, _Process.start))

    async def render(self, info: ModelInfo, chat: ChatPrompt) -> str:
        """The prompt text of a conversation by the template in it.

        Raises:
            TemplateFailed: the template refuses the conversation, or takes more time or memory than it may.
            UnsupportedParameter: it has no place for tools, or for parts of some type.
        """
        request = RenderRequest(
            chat=chat,
            model_name=info.label,
            special_tokens=getattr(info.tokenizer, "special_tokens_map", {}),
            kwargs={key: value for key, value in info.apply_chat_template_kwargs.items() if key != "chat_template"},
            max_bytes=self._limits.text,
        )
        return await asyncio.wrap_future(self._workers.submit(lambda: self._render(request)))

    def close(self) -> None:
        """Kill the processes. Blocks."""
        self._end()

    def _render(self, request: RenderRequest) -> str:
        data = pickle.dumps(request)
        try:
            answer, text = self._with_process(self._idle.pop, lambda process: process.render(data, self._limits))
        except _Ended as ended:
            self.warm()
            raise self._exceeded(ended.status) from None
        if answer["last"]:
            self.warm()
        if "exceeded" in answer:
            raise self._exceeded(answer["exceeded"])
        if "error" in answer:
            raise _error(**answer["error"])
        return text.decode()

    def _with_process(self, take: Callable[[], _Process], use: Callable[[_Process], T]) -> T:
        process = take()
        try:
            return use(process)
        finally:
            give = self._idle.append if process.is_running else self._idle.appendleft
            give(process)

    def _exceeded(self, how: int | str) -> TemplateFailed:
        """The error for a rendering that has exceeded a limit: `MEMORY`, or how its process has ended."""
        limits = self._limits
        if how == -signal.SIGXCPU:
            why = f"it takes longer than {limits.seconds:g} s to render (chat_template_timeout_s)"
        elif how == -signal.SIGALRM:
            why = (
                f"it takes longer than {limits.seconds * WALL_FACTOR:g} s by the clock to render (twice "
                "chat_template_timeout_s)"
            )
        elif how in (MEMORY, -signal.SIGKILL):
            why = f"it takes more than {limits.memory} bytes of memory to render (chat_template_max_bytes)"
        else:
            why = f"the process that renders it has ended with status {how}"
        logger.warning("a chat template of a request was ended: %s", why)
        return TemplateFailed(f"Invalid 'chat_template': {why}.", param="chat_template")


def _end(workers: Workers, processes: list[_Process]) -> None:
    workers.stop()
    for process in processes:
        process.stop()


def _error(kind: str, message: str, param: str | None = None, code: str | None = None) -> TroupeError:
    found = getattr(errors, kind, ModelError)
    if not issubclass(found, TroupeError):
        found = ModelError
    error: TroupeError = found(message, param=param, code=code)
    return error


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"}
    return {**kept, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _opened(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
