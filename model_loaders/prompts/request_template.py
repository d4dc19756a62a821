"""The process that renders chat templates of requests: `python -m model_loaders.prompts.request_template`.

A template of a request is an untrusted program. It runs here, where the kernel ends it: by an alarm, by a limit on
processor time, or by a limit on memory. Each request is a `HEADER` and a pickled `RenderRequest`; each answer is a
line of JSON and the text. Only JSON and text are sent back, so that code that breaks out of Jinja's sandbox cannot
choose what the server unpickles. The process ends when its input does, and with its parent.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import resource
import signal
import struct
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from deployments.core.calls import ChatPrompt
from deployments.core.errors import BrokenHook, TemplateFailed, TroupeError
from model_loaders.contract import ModelInfo
from model_loaders.prompts.chat_template import NO_VARIABLES, ChatTemplate

HEADER = struct.Struct("!QdQ")
"""Bytes of the pickled request, seconds of processor time it may take, bytes of memory it may take."""

MEMORY = "memory"
WALL_FACTOR = 2
"""A request may take this many times its seconds of processor time by the clock."""

_REMEMBERED = 32
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderRequest:
    """A conversation to be rendered by the template in it.

    Attributes:
        model_name: for messages.
        special_tokens: of the model's tokenizer, by name, as a template gets them.
        kwargs: the loader's `apply_chat_template_kwargs`.
        max_bytes: of the text at most, as UTF-8.
    """

    chat: ChatPrompt
    model_name: str
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_bytes: int


class _OutOfMemory(BaseException):
    """A MemoryError that is not mistaken for a template's refusal."""


class _Template:
    """A template in place of a tokenizer that has it."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self.chat_template = source
        self._special_tokens = special_tokens

    def apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        variables = {key: value for key, value in kwargs.items() if key not in NO_VARIABLES}
        try:
            rendered, _ = render_jinja_template(
                [messages], chat_template=self.chat_template, **{**self._special_tokens, **variables}
            )
        except MemoryError:
            raise _OutOfMemory from None
        return str(rendered[0])


class Renderer:
    """Renders conversations. It caches what it has found out about the latest templates."""

    def __init__(self) -> None:
        self._templates: OrderedDict[bytes, ChatTemplate] = OrderedDict()

    def render(self, request: RenderRequest) -> bytes:
        """The prompt text as UTF-8.

        Raises:
            TemplateFailed: the template cannot be read, refuses the conversation, or writes too much.
            UnsupportedParameter: it has no place for tools, or for parts of some type.
        """
        try:
            text = self._template(request).render(replace(request.chat, chat_template=None))
        except BrokenHook:
            raise _refused("it writes half of a surrogate pair, which is not text") from None
        except TemplateFailed as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise _refused(f"it is not a Jinja template: {error.__cause__}") from error
            if isinstance(error.__cause__, RecursionError):
                raise _refused("it is nested too deeply, or calls itself without end") from error
            raise
        written = text.encode()
        if len(written) > request.max_bytes:
            raise _refused(
                f"the prompt that it writes has {len(written)} bytes; this server takes {request.max_bytes} "
                "(max_body_bytes)"
            )
        return written

    def _template(self, request: RenderRequest) -> ChatTemplate:
        source = request.chat.chat_template or ""
        key = pickle.dumps((source, request.model_name, request.special_tokens, request.kwargs))
        if key not in self._templates:
            while len(self._templates) >= _REMEMBERED:
                self._templates.popitem(last=False)
            self._templates[key] = ChatTemplate(
                ModelInfo(
                    model_name=request.model_name,
                    tokenizer=_Template(source, request.special_tokens),
                    apply_chat_template_kwargs=dict(request.kwargs),
                )
            )
        self._templates.move_to_end(key)
        return self._templates[key]


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    renderer, size = Renderer(), _memory()
    _answer(answers, {"ready": True})
    while len(header := requests.read(HEADER.size)) == HEADER.size:
        length, seconds, memory = HEADER.unpack(header)
        _limit(seconds, _memory() + memory)
        try:
            answer, text = _rendered(renderer, requests.read(length))
        except (MemoryError, _OutOfMemory):
            answer, text = {"exceeded": MEMORY}, b""
        _limit(0, resource.RLIM_INFINITY)
        # A process that has grown, or that has run out of memory, gives way to a fresh one.
        last = "exceeded" in answer or _memory() > size + memory
        _answer(answers, {**answer, "last": last}, text)
        if last:
            return


def _rendered(renderer: Renderer, request: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        return {}, renderer.render(pickle.loads(request))
    except TroupeError as error:
        fields = {"message": error.message, "param": error.param, "code": error.code}
        return {"error": {"kind": type(error).__name__, **fields}}, b""


def _answer(answers: BinaryIO, answer: Mapping[str, Any], text: bytes = b"") -> None:
    answers.write(json.dumps({**answer, "bytes": len(text)}).encode() + b"\n" + text)
    answers.flush()


def _refused(why: str) -> TemplateFailed:
    return TemplateFailed(f"Invalid 'chat_template': {why}.", param="chat_template")


def _limit(seconds: float, memory: int) -> None:
    """Let the kernel end this process after `seconds` seconds and limit its memory; 0 s sets no time limit.

    The alarm and the signal of the processor's limit are not handled: they end a process that is busy in C, too.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds * WALL_FACTOR)
    _set_limit(resource.RLIMIT_CPU, math.ceil(_cpu_seconds() + seconds) if seconds else resource.RLIM_INFINITY)
    _set_limit(resource.RLIMIT_AS, memory)


def _set_limit(kind: int, value: int) -> None:
    """Set a limit, no higher than this process may."""
    _, most = resource.getrlimit(kind)
    if most != resource.RLIM_INFINITY and (value == resource.RLIM_INFINITY or value > most):
        value = most
    resource.setrlimit(kind, (value, most))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _memory() -> int:
    """Bytes of this process's address space, which is what `RLIMIT_AS` limits."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _end_with(parent: int) -> None:
    """Let the kernel end this process with its parent."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    os.nice(10)
    for _kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(_kind, (0, 0))
    # What a library prints must not get among the answers.
    _answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    main(sys.stdin.buffer, _answers)
