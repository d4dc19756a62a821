"""One line of a batch: sent as a request, and sent again if that may help."""

from __future__ import annotations

import asyncio
import json

from deployments.batches.client import Compute, LineAnswer, LineCall

_TRANSIENT = (429, 503, 504)
_TRIES = 5
_LONGEST_WAIT_S = 30.0


async def patient_answer(compute: Compute, call: LineCall) -> LineAnswer:
    """The answer of a line, asked for again while its error is one that passes."""
    tries = 0
    while True:
        answer = await compute(call)
        tries += 1
        if answer.status not in _TRANSIENT or (tries >= _TRIES and not _passes(answer)):
            return answer
        await asyncio.sleep(min(_LONGEST_WAIT_S, answer.retry_after or 1.0))


def _passes(answer: LineAnswer) -> bool:
    """Whether an error ends at some time, whatever the request is: a replica was lost, or the queue is full."""
    code = error_code(answer.body)
    return code == "unavailable" or (answer.status == 429 and code != "insufficient_quota")


def error_code(body: bytes) -> str | None:
    """The code of an error as OpenAI writes them; None if it is not one."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return None
