"""What a hook returned as a text, checked against the contract."""

from __future__ import annotations

from typing import Any

from deployments.core.errors import BrokenHook


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
