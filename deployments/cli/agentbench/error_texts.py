"""The server's errors as AgentBench reads them: it finds an overflow of the context by words of the text.

A sample with such an error counts as completed. Any other error with these words would lower a score without a trace.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deployments.cli.endpoint.server import Endpoint, as_json

HI = [{"role": "user", "content": "Hi"}]
_FAULTY: dict[str, Any] = {
    "an unknown model": {"model": "no-such-model-of-this-server"},
    "a temperature that is too high": {"temperature": 99},
    "no messages": {"messages": []},
    "messages that are not a list": {"messages": "Hi"},
    "an unknown role": {"messages": [{"role": "judge", "content": "Hi"}]},
    "a message without content": {"messages": [{"role": "user"}]},
    "a negative max_tokens": {"max_tokens": -1},
    "a penalty that is too low": {"presence_penalty": -300},
    "a top_p that is too high": {"top_p": 2},
    "no choices": {"n": 0},
    "a tool without a name": {"tools": [{"type": "function", "function": {}}]},
    "an unknown response_format": {"response_format": {"type": "yaml"}},
}
"""Fields that make a request wrong, by what is wrong."""


def faults(
    server: Endpoint, model: str, window: int | None, overflows: Callable[[Sequence[str]], list[bool]]
) -> list[str]:
    """What AgentBench would misread: a line for each error of the server.

    Args:
        window: the model's context, in tokens, if it is known.
        overflows: AgentBench's own classifier.
    """
    answers = list(_answers(server, model, window))
    found = overflows([text for _, _, text, _ in answers])
    return [
        line
        for (wrong, status, text, meant), taken in zip(answers, found, strict=True)
        if (line := _fault(wrong, status, text, meant, taken))
    ]


def _answers(server: Endpoint, model: str, window: int | None) -> Iterator[tuple[str, int, str, bool]]:
    """What is wrong with a request, the status and text of its answer, and whether it is an overflow."""
    body = {"model": model, "messages": HI, "temperature": 0, "max_tokens": 1}
    for wrong, fields in _FAULTY.items():
        answer = server.request("POST", "/v1/chat/completions", as_json({**body, **fields}))
        yield wrong, answer.status_code, answer.text, False
    answer = server.request("POST", "/v1/chat/completions", "{")
    yield "a body that is not JSON", answer.status_code, answer.text, False
    if window is not None:
        chance = random.Random(0)
        long = "".join(chance.choice(string.ascii_letters + string.digits) for _ in range(6 * window))
        text = as_json({**body, "messages": [{"role": "user", "content": long}]})
        answer = server.request("POST", "/v1/chat/completions", text)
        yield "a request that is longer than the context", answer.status_code, answer.text, True


def _fault(wrong: str, status: int, text: str, meant: bool, taken: bool) -> str:
    told = f"status {status}: {text[:300].strip()}"
    if status == 200:
        return f"{wrong} is answered: {told}" if meant else ""
    if meant and not taken:
        return f"AgentBench does not see an overflow of the context in the error for {wrong}, {told}"
    if taken and not meant:
        return f"AgentBench takes the error for {wrong} for an overflow of the context, {told}"
    return ""
