"""A loader's own hooks, called once when the model loads: what breaks the contract is a load error."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from deployments.core.calls import ChatPrompt
from deployments.core.errors import RAISED_BY_HOOKS, BrokenHook, ModelError, ModelLoadFailed, last_line
from deployments.engine.model.random_state import RANDOM_STATE, in_turn
from deployments.host.embedding.hook import hooked
from model_loaders.contract import ModelInfo
from model_loaders.prompts.encoded import Encoded
from model_loaders.prompts.hooks import Hooks

logger = logging.getLogger("troupe.host")

T = TypeVar("T")

_TEXT = "Hello"


def probe_hooks(info: ModelInfo, *, limit: float) -> list[str]:
    """Call template, encode, decode and embed hooks of the loader with one short text.

    `generate` is not called, as it may take long. A hook that raises or hangs here may still serve other texts: a
    warning says where it raised. A hook that draws from the process's random state gets a turn of it for every later
    call.

    Args:
        info: its hooks that draw are replaced.
        limit: seconds after which a hook counts as hung.

    Returns:
        The hooks that returned what the contract says.

    Raises:
        ModelLoadFailed: a hook returned something else than the contract says.
    """
    found: list[BrokenHook] = []
    tried = _Tried(info, limit)

    def run() -> None:
        try:
            _probe(info, tried)
        except BrokenHook as broken:
            found.append(broken)

    thread = threading.Thread(target=run, name="hook-probe", daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        logger.warning("A hook of model %s has not returned for %g s while it loads.", info.label, limit)
    if found:
        raise ModelLoadFailed(f"Model {info.label!r}: {found[0].message}")
    return list(tried.right)


def _probe(info: ModelInfo, tried: _Tried) -> None:
    hooks, text, encoded = Hooks(info), _TEXT, Encoded(input_ids=[])
    if info.apply_chat_template is not None:
        chat = ChatPrompt(messages=[{"role": "user", "content": _TEXT}])
        text = tried.call("apply_chat_template", lambda: hooks.render(chat)) or text
    if info.encode is not None or info.decode is not None:
        encoded = tried.call("encode", lambda: hooks.encode(text)) or encoded
    if info.decode is not None and encoded.input_ids:
        tried.call("decode", lambda: hooks.decode(encoded.input_ids))
    if (embed := info.embed) is not None:
        for texts in ([_TEXT], [_TEXT, _TEXT * 2]):
            tried.call("embed", partial(hooked, embed, texts))


class _Tried:
    """Calls of one model's hooks, each in a turn of the random state."""

    def __init__(self, info: ModelInfo, limit: float) -> None:
        self._info = info
        self._limit = limit
        self.right: list[str] = []

    def call(self, name: str, call: Callable[[], T]) -> T | None:
        """What a hook returned; None if it raised."""
        found: list[T] = []
        try:
            draws = RANDOM_STATE.draws(lambda: found.append(call()), self._limit)
        except BrokenHook:
            raise
        except ModelError as error:
            logger.warning("%s, when it was tried at load.", error.message)
            return None
        except RAISED_BY_HOOKS as error:
            logger.info("Hook %s raised when it was tried at load: %s", name, last_line(error))
            return None
        if draws and (hook := getattr(self._info, name)) is not None:
            setattr(self._info, name, in_turn(hook, self._limit))
        if name not in self.right:
            self.right.append(name)
        return found[0]
