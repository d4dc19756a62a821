"""Calling hooks that a loader gives: the arguments that they accept, and the text that they return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from deployments.core.errors import BrokenHook
from model_loaders.contract import Hook


def as_text(returned: Any, hook: str, hint: str = "") -> str:
    """What a hook returned, which has to be a text that can be encoded and sent.

    Args:
        hook: its name, for the message.
        hint: how to return one.

    Raises:
        BrokenHook: it is no `str`, or has half of a surrogate pair.
    """
    if not isinstance(returned, str):
        raise BrokenHook(f"Hook {hook} returned {type(returned).__name__}; expected str{hint}.")
    try:
        returned.encode()
    except UnicodeEncodeError:
        raise BrokenHook(f"Hook {hook} returned half of a surrogate pair; expected Unicode text.") from None
    return returned


def accepted(hook: Hook, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a user's function accepts; all of them if it has **kwargs or does not say."""
    parameters = parameters_of(hook)
    if parameters is None or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(kwargs)
    return {key: value for key, value in kwargs.items() if key in parameters}


def parameters_of(hook: Hook) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a user's function or object, by name; None if it does not say."""
    try:
        return inspect.signature(hook if inspect.isroutine(hook) else type(hook).__call__).parameters
    except (TypeError, ValueError):
        return None
