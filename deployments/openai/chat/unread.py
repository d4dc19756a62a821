"""Tells of tool calls that could not be read, and so are in the content."""

from __future__ import annotations

import logging
from urllib.parse import quote

from deployments.openai.http.exchange import Exchange

logger = logging.getLogger(__name__)

UNREAD_HEADER = "x-troupe-unread"
# What was logged: one line for each model and marker.
_LOGGED: set[tuple[str, str]] = set()
_LOGGED_MOST = 1000


def note_unread(exchange: Exchange, marker: str | None, model: str) -> None:
    """Say in a header, and once in the log, that an answer's content holds the marker of a call.

    A stream's headers are sent before that is known.
    """
    if marker is None:
        return
    exchange.headers[UNREAD_HEADER] = quote(marker)
    if (model, marker) not in _LOGGED and len(_LOGGED) < _LOGGED_MOST:
        _LOGGED.add((model, marker))
        logger.warning(
            "An answer of %s has %r in its content: a tool call that could not be read (request %s)",
            model,
            marker,
            exchange.request_id,
        )
