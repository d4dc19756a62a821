"""Errors as clients get them: OpenAI's JSON object, as a response or as an event of a stream."""

from __future__ import annotations

import json
import math
import re

from fastapi import Response
from starlette.types import Scope

from deployments.core.errors import ContextOverflow, ReplicaLost, TroupeError, VersionMismatch

_MESSAGES = re.compile(r"/v1/messages(/|$)|/messages(/count_tokens)?$")
"""Paths of Anthropic's API, also below a model's, and also those that this server does not have."""
_OVERLOADED = 529
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OVERFLOW = re.compile(r"context length is (\d+) tokens.* resulted in (\d+) tokens")
# AgentBench's client scores a failed call as "context limit reached" when the lower-cased body holds one of these
# words and one of a list as common as "max", "up" or "over".
_CONTEXT_WORDS = re.compile(rb"(p)(r)(ompt)|(c)(o)(ntext)|(t)(o)(kens)", re.IGNORECASE)


def error_body(error: TroupeError) -> bytes:
    r"""The error as OpenAI's JSON object, in ASCII.

    Unless the error is a context overflow, one letter of the words that AgentBench takes for one is written as a JSON
    escape (`pr\u006fmpt`-like): the value is the same, a search in the raw text finds nothing.
    """
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    body = json.dumps({"error": fields}).encode("ascii")
    return body if isinstance(error, ContextOverflow) else _CONTEXT_WORDS.sub(_escaped, body)


def _escaped(match: re.Match[bytes]) -> bytes:
    # The second letter: the first may be the end of an escape such as \t.
    first, second, rest = (group for group in match.groups() if group is not None)
    return first + b"\\u%04x" % ord(second) + rest


def error_headers(error: TroupeError) -> dict[str, str]:
    """Headers that say whether and when a client is to try again."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if (error.status >= 500 or isinstance(error, VersionMismatch)) and not error.retryable:
        headers["x-should-retry"] = "false"
    if isinstance(error, ReplicaLost):
        headers["x-troupe-lost"] = "replica"
    return headers


def error_response(error: TroupeError, scope: Scope | None = None) -> Response:
    """The response to a request that failed.

    Args:
        scope: of the request; routes of the Messages API have Anthropic's errors.
    """
    status = _OVERLOADED if error.status == 503 and _is_message(scope) else error.status
    headers = error_headers(error)
    return Response(error_body_for(scope, error), status_code=status, headers=headers, media_type="application/json")


def error_body_for(scope: Scope | None, error: TroupeError) -> bytes:
    """The error as the clients of the request's route have it."""
    if scope is not None and _is_message(scope):
        return messages_error_body(error, scope["state"]["request_id"])
    return error_body(error)


def _is_message(scope: Scope | None) -> bool:
    return scope is not None and _MESSAGES.search(scope["path"]) is not None


def messages_error_body(error: TroupeError, request_id: str) -> bytes:
    """The error as Anthropic's JSON object: https://docs.anthropic.com/en/api/errors"""
    message = error.message
    if isinstance(error, ContextOverflow) and (counts := _OVERFLOW.search(message)):
        # The words by which Claude Code knows that it has to shorten the conversation.
        message = f"prompt is too long: {counts[2]} tokens > {counts[1]} maximum. {message}"
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    fields = {"type": kind, "message": message}
    return json.dumps({"type": "error", "error": fields, "request_id": request_id}).encode("ascii")


def internal_error(error: BaseException) -> TroupeError:
    """What clients learn of an exception that nobody foresaw: its kind, not its text."""
    return TroupeError(
        f"The server failed on this request ({type(error).__name__}). Its log has the details under the request id.",
        code="internal_error",
    )
